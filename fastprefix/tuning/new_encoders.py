"""The encoder that a configuration asks for, at its start."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.encoders import Encoder, HeadNumbers, Layout, build_encoder, slot_lengths
from fastprefix.hf.devices import device_of
from fastprefix.hf.patch.patch import patch_of
from fastprefix.kv import Group
from fastprefix.tuning.configs.prefix_config import PrefixConfig
from fastprefix.tuning.initial_values import initial_prefix


def new_encoder(
    model: PreTrainedModel,
    config: PrefixConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Encoder:
    """An encoder for a patched model, on its device.

    Raises:
        ValueError: the config does not fit the model, or init="text" without a tokenizer.
        FileNotFoundError: config.init_prefix does not exist.
    """
    patch = patch_of(model)
    if config.prefix_in_window and set(patch.groups) != {"decoder"}:
        raise ValueError(
            f"prefix_in_window: got True, takes False for this {type(model).__name__}; prefixes "
            "slide in decoder-only models alone"
        )
    for name in ("gated", "prefix_bias", "layers", "layer_lengths"):
        if patch.expanded is not None and getattr(config, name) not in (None, False):
            raise ValueError(
                f"{name}: got {getattr(config, name)!r}, takes none for {type(model).__name__} "
                "with fallback='expand', which keeps the prefix in its KV cache"
            )
    shapes = patch.shapes
    P, offset = config.num_virtual_tokens, config.position_offset
    layers = config.layers if config.groups is None else _of_groups(config.groups, model)
    if offset is None and patch.default_offset(P) != P:
        offset = patch.default_offset(P)  # None follows a prefix that grows
    if offset is None and config.gated:
        offset = 0  # the text keeps its positions, so that a gate of 0 is the bare model
    lengths = slot_lengths(len(shapes), P, layers, config.layer_lengths)
    start = initial_prefix(config, model, tokenizer, Layout.make(shapes, lengths))
    encoder = build_encoder(
        shapes,
        lengths,
        embedding_size=model.config.get_text_config().hidden_size,
        prefix_projection=config.prefix_projection,
        encoder_reparameterization_type=config.encoder_reparameterization_type,
        encoder_hidden_size=config.encoder_hidden_size,
        encoder_num_layers=config.encoder_num_layers,
        encoder_per_layer=config.encoder_per_layer,
        encoder_orthogonal=config.encoder_orthogonal,
        share_layers=config.share_layers,
        position_offset=offset,
        dropout=config.dropout,
        num_frozen_tokens=config.num_frozen_tokens,
        init_std=config.init_std,
    )
    if config.gated or config.prefix_bias is not None:
        heads = [n if length else 0 for n, length in zip(patch.query_heads, lengths, strict=True)]
        fixed = None if isinstance(config.prefix_bias, str) else config.prefix_bias
        encoder.reweighting = HeadNumbers("gate" if config.gated else "bias", heads, fixed)
    encoder = encoder.to(device_of(model))
    if start is not None:
        encoder.start_from(start)
    if (sharding := patch.sharding) is not None:
        sharding.synchronize(encoder)
    return encoder


def _of_groups(groups: Sequence[Group], model: PreTrainedModel) -> list[int]:
    """The attention layers of a patched model that belong to some groups."""
    known = patch_of(model).groups
    if not set(groups) <= set(known):
        raise ValueError(
            f"groups: got {groups!r}, takes some of {tuple(dict.fromkeys(known))}, which this "
            f"{type(model).__name__} has"
        )
    return [layer for layer, group in enumerate(known) if group in groups]
