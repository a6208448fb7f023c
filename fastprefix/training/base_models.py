"""Loading models and tokenizers by hub name, folder, GGUF file, or from the index package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from fastprefix.training.messages import reason
from fastprefix.training.sources import DEFAULT_MODEL, PACKAGES, model_source

__all__ = [
    "DEFAULT_MODEL",
    "load",
    "load_causal",
    "load_config",
    "load_for",
    "load_model",
    "load_seq2seq",
    "load_tokenizer",
]


def load(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal language model and its tokenizer, padded on the left for generation.

    Args:
        name: as :func:`fastprefix.training.sources.model_source` takes it.
        dtype: of the weights.

    Raises:
        FileNotFoundError: the package, file or folder is missing.
        ValueError: what is there cannot be loaded.
    """
    tokenizer = load_tokenizer(name)
    return load_causal(name, dtype), tokenizer


def load_tokenizer(name: str, task_type: str = "CAUSAL_LM") -> Tokenizer:
    """The tokenizer of :func:`load`. Loading it is fast compared with the model.

    Args:
        name: as in :func:`load`.
        task_type: PEFT's name of what the model does. For "CAUSAL_LM" texts are padded on the left,
            for the others where the tokenizer does it.
    """
    folder, gguf = model_source(name)
    options: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    with _clear(name, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if task_type == "CAUSAL_LM":
        tokenizer.padding_side = "left"
    return tokenizer


def load_causal(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of :func:`load`."""
    folder, gguf = model_source(name)
    if gguf is None:
        _check_causal(name)
    with _clear(name, "the model"):
        return _loaded(AutoModelForCausalLM, folder, gguf, dtype)


def load_seq2seq(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """An encoder-decoder, named as in :func:`load`."""
    folder, gguf = model_source(name)
    with _clear(name, "the model"):
        return _loaded(AutoModelForSeq2SeqLM, folder, gguf, dtype)


def load_for(
    name: str, task_type: str, dtype: torch.dtype, labels: Sequence[str] = ()
) -> PreTrainedModel:
    """A base model with the head of a task.

    Args:
        name: as in :func:`load`.
        task_type: PEFT's name of what the model does: "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS" or
            "QUESTION_ANS".
        dtype: of the weights.
        labels: names of the classes, for SEQ_CLS.

    Raises:
        FileNotFoundError: the package, file or folder is missing.
        ValueError: what is there cannot be loaded.
    """
    if task_type == "CAUSAL_LM":
        return load_causal(name, dtype)
    if task_type == "SEQ_2_SEQ_LM":
        return load_seq2seq(name, dtype)
    folder, gguf = model_source(name)
    named: dict[str, Any] = {}
    if task_type == "SEQ_CLS":
        named = {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "ignore_mismatched_sizes": True,  # a head for other classes is replaced
        }
    kinds = {
        "SEQ_CLS": AutoModelForSequenceClassification,
        "QUESTION_ANS": AutoModelForQuestionAnswering,
    }
    with _clear(name, "the model"):
        return _loaded(kinds[task_type], folder, gguf, dtype, **named)


def load_config(name: str) -> Any:
    """A model's configuration, named as in :func:`load`."""
    folder, gguf = model_source(name)
    options: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    with _clear(name, "the configuration"):
        return AutoConfig.from_pretrained(folder, **options)


def load_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the class that its configuration names, for text or not.

    Args:
        name: as in :func:`load`.
        dtype: of the weights.

    Raises:
        FileNotFoundError: the package, file or folder is missing.
        ValueError: what is there cannot be loaded.
    """
    folder, gguf = model_source(name)
    kind: Any = AutoModelForCausalLM
    if gguf is None:
        named = getattr(load_config(name), "architectures", None) or ["AutoModel"]
        kind = getattr(transformers, named[0], AutoModel)
    with _clear(name, "the model"):
        return _loaded(kind, folder, gguf, dtype)


def _check_causal(name: str) -> None:
    """Refuses an encoder-decoder: its causal class would contain only the decoder."""
    config = load_config(name)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model: got {name}, an encoder-decoder ({config.model_type}); takes a causal language "
            "model"
        )


@contextlib.contextmanager
def _clear(name: str, what: str) -> Iterator[None]:
    """Turns every error of transformers into one that names the model."""
    try:
        yield
    except Exception as error:
        # the message may fill a page, so keep the first sentence
        told = reason(error).splitlines()[0].partition(". ")[0].strip().rstrip(".:")
        here = name in PACKAGES or Path(name).exists()
        where = "" if here else ", which is no folder here"
        raise ValueError(f"model: got {name}{where}; {what} cannot be loaded: {told}") from error


def _loaded(
    kind: Any, folder: str, gguf: str | None, dtype: torch.dtype, **named: Any
) -> PreTrainedModel:
    """The model in evaluation mode, with plain weights: packed ones allow no training or saving."""
    if gguf is None:
        model: PreTrainedModel = kind.from_pretrained(folder, dtype=dtype, **named)
        return model.eval()
    plain = GgufConfig(dequantize=True)
    model = kind.from_pretrained(
        folder, dtype=dtype, gguf_file=gguf, quantization_config=plain, **named
    )
    return _dequantized(model).eval()


def _dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """Removes the attributes that mark a model as quantised, because they prevent saving it."""
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model
