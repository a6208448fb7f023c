"""The encoder that a configuration asks for, at its start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.encoders import DirectEncoder, MLPEncoder, to_flat
from fastprefix.hf.patching import default_offset, layer_groups, layer_shapes
from fastprefix.hf.prefill import text_keys_values
from fastprefix.kv import LayerShape
from fastprefix.tuning.config import PrefixConfig

Encoder = DirectEncoder | MLPEncoder


def new_encoder(
    model: PreTrainedModel,
    config: PrefixConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Encoder:
    """An encoder for a patched model, on its device, at the start that the configuration names.

    Raises:
        ValueError: init="text" without a tokenizer or for a model that reads no text, a text
            without tokens, or groups that the model does not have.
    """
    start = _initial_ids(config, model, tokenizer)
    layers, shapes = chosen_layers(config, model), layer_shapes(model)
    P, offset = config.num_virtual_tokens, config.position_offset
    encoder = build_encoder(
        config,
        [shapes[layer] for layer in layers],
        hidden_size=model.config.get_text_config().hidden_size,
        position_offset=default_offset(model, P) if offset is None else offset,
    ).to(model.device)
    if start is not None:
        encoder.start_from(to_flat(text_keys_values(model, start).select(layers)))
    return encoder


def chosen_layers(config: PrefixConfig, model: PreTrainedModel) -> tuple[int, ...]:
    """Which attention layers of a patched model get a prefix.

    Raises:
        ValueError: groups that the model does not have.
    """
    groups = layer_groups(model)
    missing = set(config.groups or ()) - set(groups)
    if missing:
        raise ValueError(
            f"groups: got {config.groups!r}, takes some of {tuple(dict.fromkeys(groups))}, which "
            f"this {type(model).__name__} has"
        )
    return tuple(
        layer
        for layer, group in enumerate(groups)
        if config.groups is None or group in config.groups
    )


def build_encoder(
    config: PrefixConfig, shapes: Sequence[LayerShape], *, hidden_size: int, position_offset: int
) -> Encoder:
    """An encoder at its random start.

    Args:
        config: see :class:`PrefixConfig`.
        shapes: of the layers that get a prefix.
        hidden_size: the model's, the embedding's width in front of an MLP.
        position_offset: see :class:`fastprefix.PrefixKV`.
    """
    if config.prefix_projection:
        return MLPEncoder(
            shapes,
            config.num_virtual_tokens,
            embedding_size=hidden_size,
            hidden_size=config.encoder_hidden_size or hidden_size,
            position_offset=position_offset,
            dropout=config.dropout,
            init_std=config.init_std,
        )
    return DirectEncoder(
        shapes,
        config.num_virtual_tokens,
        position_offset=position_offset,
        dropout=config.dropout,
        init_std=config.init_std,
    )


def _initial_ids(
    config: PrefixConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Tensor | None:
    """[P] token ids whose keys and values the prefix starts from; None for a random start."""
    P = config.num_virtual_tokens
    if config.init == "random":
        return None
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"init: got {config.init!r}, takes 'random' for this {type(model).__name__}, which "
            f"reads {model.main_input_name} and no text"
        )
    if config.init == "vocab":
        return torch.randint(_embedding_weight(model).shape[0], (P,))
    if tokenizer is None:
        raise ValueError("tokenizer: got None, init='text' needs one")
    ids = torch.tensor(tokenizer(config.init_text)["input_ids"])
    if len(ids) == 0:
        raise ValueError(f"init_text: {config.init_text!r} has no tokens")
    return ids.repeat(-(-P // len(ids)))[:P]


def _embedding_weight(model: PreTrainedModel) -> Tensor:
    """[vocabulary, hidden]."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight
