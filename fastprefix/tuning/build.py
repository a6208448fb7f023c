"""The encoder that a configuration asks for, at its start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.encoders import DirectEncoder, MLPEncoder, to_flat
from fastprefix.hf.patching import layer_shapes
from fastprefix.kv import LayerShape, PrefixKV
from fastprefix.tuning.config import PrefixConfig

Encoder = DirectEncoder | MLPEncoder


def new_encoder(
    model: PreTrainedModel,
    config: PrefixConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Encoder:
    """An encoder for a patched model, on its device, at the start that the configuration names.

    Raises:
        ValueError: init="text" without a tokenizer, or a text without tokens.
    """
    start = _initial_ids(config, model, tokenizer)
    hidden_size = _embedding_weight(model).shape[1]
    encoder = build_encoder(config, layer_shapes(model), hidden_size).to(model.device)
    if start is not None:
        encoder.start_from(to_flat(PrefixKV.prefill(model, start)))
    return encoder


def build_encoder(config: PrefixConfig, shapes: Sequence[LayerShape], hidden_size: int) -> Encoder:
    """An encoder at its random start.

    Args:
        config: see :class:`PrefixConfig`.
        shapes: of the model's layers.
        hidden_size: the model's, the embedding's width in front of an MLP.
    """
    if config.prefix_projection:
        return MLPEncoder(
            shapes,
            config.num_virtual_tokens,
            embedding_size=hidden_size,
            hidden_size=config.encoder_hidden_size or hidden_size,
            position_offset=config.position_offset,
            dropout=config.dropout,
            init_std=config.init_std,
        )
    return DirectEncoder(
        shapes,
        config.num_virtual_tokens,
        position_offset=config.position_offset,
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
