"""Inputs of a few tokens that a model can run on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastprefix.hf.devices import device_of
from fastprefix.hf.multimodal import language_model
from fastprefix.hf.patch.probe import is_encoder_decoder, shortest_inputs, takes

# Tokens of prefix and of text: together fewer than any real window or chunk.
PREFIX, TEXT = 3, 3


def samples(model: PreTrainedModel, length: int, causal: bool) -> Iterator[dict[str, Any]]:
    """Keyword arguments of one forward, the sample that shows most first.

    First two rows, one of them padded. Then one row, for models that accept no batch (classifiers
    without a padding token). Then the input of the probe.

    Args:
        model: a transformers model.
        length: tokens in a row.
        causal: whether pads are on the left, as for generation, and not on the right.
    """
    if reads_text(model):
        pads = length // 3
        mask = torch.ones(2, length, dtype=torch.long, device=device_of(model))
        where = slice(0, pads) if causal else slice(length - pads, length)
        mask[1, where] = 0
        batch = tokens(model, 2, length)
        padding = _token(model, "pad_token_id")
        batch["input_ids"][1, where] = 0 if padding is None else padding
        yield {**batch, "attention_mask": mask}
        yield tokens(model, 1, length)
    yield shortest_inputs(model)


def reads_text(model: PreTrainedModel) -> bool:
    """Whether a model runs on token ids alone."""
    return model.main_input_name == "input_ids" or language_model(model) is not None


def tokens(model: PreTrainedModel, rows: int, length: int) -> dict[str, Any]:
    """Token ids [rows, length]. None is special, except for an end token in encoder-decoders."""
    ids = _ordinary(model, 2 * rows * length).view(2, rows, length)
    if not is_encoder_decoder(model):
        return {"input_ids": ids[0]}
    end = _token(model, "eos_token_id")
    if end is not None:
        ids[:, :, length // 2] = end  # classifiers look for one in every row
    return {"input_ids": ids[0], "decoder_input_ids": ids[1]}


def no_cache(model: PreTrainedModel) -> dict[str, Any]:
    """The argument that keeps a forward from making a cache, if it has one."""
    return {"use_cache": False} if takes(model, "use_cache") else {}


def _ordinary(model: PreTrainedModel, number: int) -> Tensor:
    """Token ids spread over the vocabulary, without the special ones that the config names."""
    text = model.config.get_text_config()
    weight = getattr(model.get_input_embeddings(), "weight", None)  # Musicgen has several
    size = int(text.vocab_size if weight is None else weight.shape[0])
    named: set[int] = set()
    for config in (model.config, text):
        for name, value in config.to_dict().items():
            if "token" in name and isinstance(value, (int, list)):
                ids = value if isinstance(value, list) else [value]
                named.update(x for x in ids if isinstance(x, int))
    free = [x for x in range(min(size, 4096)) if x not in named] or [0]
    chosen = [free[(7 + 13 * i) % len(free)] for i in range(number)]
    return torch.tensor(chosen, device=device_of(model))


def _token(model: PreTrainedModel, name: str) -> int | None:
    value = getattr(model.config.get_text_config(), name, None)
    return value if isinstance(value, int) and value >= 0 else None
