"""The encoder that a configuration asks for."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.encoders import Encoder, build_encoder, slot_lengths
from fastprefix.hf.patching import layer_shapes
from fastprefix.tuning.config import PrefixConfig
from fastprefix.tuning.init import embedding_weight, initial_prefix


def new_encoder(
    model: PreTrainedModel, config: PrefixConfig, tokenizer: PreTrainedTokenizerBase | None
) -> Encoder:
    """An encoder for a patched model, on its device, at the start that the configuration names.

    Raises:
        ValueError: the config does not fit the model, or init="text" without a tokenizer.
        FileNotFoundError: config.init_prefix does not exist.
    """
    shapes = layer_shapes(model)
    lengths = slot_lengths(
        len(shapes), config.num_virtual_tokens, config.layers, config.layer_lengths
    )
    encoder = build_encoder(
        shapes,
        lengths,
        embedding_size=embedding_weight(model).shape[1],
        prefix_projection=config.prefix_projection,
        encoder_reparameterization_type=config.encoder_reparameterization_type,
        encoder_hidden_size=config.encoder_hidden_size,
        encoder_num_layers=config.encoder_num_layers,
        encoder_per_layer=config.encoder_per_layer,
        encoder_orthogonal=config.encoder_orthogonal,
        share_layers=config.share_layers,
        position_offset=config.position_offset,
        dropout=config.dropout,
        num_frozen_tokens=config.num_frozen_tokens,
        init_std=config.init_std,
    ).to(model.device)
    start = initial_prefix(config, model, tokenizer, encoder.layout)
    if start is not None:
        encoder.start_from(start)
    return encoder
