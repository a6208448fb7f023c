"""The encoder that a configuration asks for, at its start."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.encoders import Encoder, build_encoder, slot_lengths
from fastprefix.hf.patching import default_offset, layer_groups, layer_shapes
from fastprefix.tuning.config import PrefixConfig
from fastprefix.tuning.init import initial_prefix


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
    P, offset = config.num_virtual_tokens, config.position_offset
    if offset is None and default_offset(model, P) != P:
        offset = default_offset(model, P)  # None follows a prefix that grows
    shapes = layer_shapes(model)
    encoder = build_encoder(
        shapes,
        slot_lengths(len(shapes), P, _layers(config, model), config.layer_lengths),
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
    ).to(model.device)
    start = initial_prefix(config, model, tokenizer, encoder.layout)
    if start is not None:
        encoder.start_from(start)
    return encoder


def _layers(config: PrefixConfig, model: PreTrainedModel) -> list[int] | None:
    """The layers that get a prefix, None for all."""
    if config.groups is None:
        return config.layers
    groups = layer_groups(model)
    missing = set(config.groups) - set(groups)
    if missing:
        raise ValueError(
            f"groups: got {config.groups!r}, takes some of {tuple(dict.fromkeys(groups))}, which "
            f"this {type(model).__name__} has"
        )
    return [layer for layer, group in enumerate(groups) if group in config.groups]
