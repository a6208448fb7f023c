"""The untrained encoder of a prefix or of a prompt, as its configuration describes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.encoders import (
    Encoder,
    EncoderOptions,
    HeadParameters,
    build_encoder,
    slot_lengths,
)
from fastprefix.hf.devices import device_of
from fastprefix.hf.patch.patch import patch_of
from fastprefix.kv import FlatLayout, Group
from fastprefix.tuning.configs.prefix_config import PrefixConfig
from fastprefix.tuning.configs.prompt_config import PromptConfig
from fastprefix.tuning.initial_values import embedding_weight, initial_ids, initial_prefix
from fastprefix.tuning.prompt_encoder import PromptEncoder


def new_prefix_encoder(
    model: PreTrainedModel,
    config: PrefixConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Encoder:
    """A prefix's untrained encoder for a patched model, on the model's device.

    Raises:
        ValueError: the config does not fit the model, or init="text" needs a tokenizer.
        FileNotFoundError: config.init_prefix does not exist.
    """
    _check_fits(config, model)
    patch = patch_of(model)
    shapes = patch.shapes
    P, offset = config.num_virtual_tokens, config.position_offset
    layers = config.layers if config.groups is None else _of_groups(config.groups, model)
    if offset is None and patch.default_offset(P) != P:
        offset = patch.default_offset(P)  # to the encoder, None is the prefix's present length
    if offset is None and config.gated:
        offset = 0  # the text keeps its positions, so that a gate of 0 is the bare model
    lengths = slot_lengths(len(shapes), P, layers, config.layer_lengths)
    start = initial_prefix(config, model, tokenizer, FlatLayout.make(shapes, lengths))
    values = {field.name: getattr(config, field.name) for field in fields(EncoderOptions)}
    options = EncoderOptions(**{**values, "position_offset": offset})
    width = model.config.get_text_config().hidden_size
    encoder = build_encoder(shapes, lengths, options, embedding_size=width)
    if config.gated or config.prefix_bias is not None:
        heads = [n if size else 0 for n, size in zip(patch.query_heads, lengths, strict=True)]
        fixed = None if isinstance(config.prefix_bias, str) else config.prefix_bias
        encoder.reweighting = HeadParameters("gate" if config.gated else "bias", heads, fixed)
    encoder = encoder.to(device_of(model))
    if start is not None:
        encoder.start_from(start)
    if patch.sharding is not None:
        patch.sharding.synchronize(encoder)
    return encoder


def new_prompt_encoder(
    model: PreTrainedModel, config: PromptConfig, tokenizer: PreTrainedTokenizerBase | None
) -> PromptEncoder:
    """A prompt's untrained encoder for a model, on the model's device.

    Raises:
        TypeError: tokenizer is none.
        ValueError: init="text" needs a tokenizer and a text with tokens, or the model reads no
            tokens.
    """
    start = initial_ids(config, model, tokenizer)
    encoder = PromptEncoder(config, embedding_weight(model).shape[1]).to(device_of(model))
    if start is not None:
        with torch.no_grad():  # call the module: it may scale the embeddings that it looks up
            encoder.start_from(model.get_input_embeddings()(start.to(device_of(model))))
    return encoder


def _check_fits(config: PrefixConfig, model: PreTrainedModel) -> None:
    """Refuses what this model, or the way in which it was patched, cannot do."""
    if config.prefix_in_window and set(patch_of(model).groups) != {"decoder"}:
        raise ValueError(
            f"prefix_in_window: got True, takes False for this {type(model).__name__}; prefixes "
            "slide in decoder-only models alone"
        )
    for name in ("gated", "prefix_bias", "layers", "layer_lengths"):
        if patch_of(model).expanded is not None and getattr(config, name) not in (None, False):
            raise ValueError(
                f"{name}: got {getattr(config, name)!r}, takes none for {type(model).__name__} "
                "with fallback='expand', which keeps the prefix in its KV cache"
            )


def _of_groups(groups: Sequence[Group], model: PreTrainedModel) -> list[int]:
    """The attention layers of a patched model that belong to one of the groups."""
    known = patch_of(model).groups
    if not set(groups) <= set(known):
        raise ValueError(
            f"groups: got {groups!r}, takes some of {tuple(dict.fromkeys(known))}, which this "
            f"{type(model).__name__} has"
        )
    return [layer for layer, group in enumerate(known) if group in groups]
