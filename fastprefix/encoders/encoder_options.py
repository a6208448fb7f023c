"""An encoder by the names that a configuration uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fastprefix.arguments import refuses_unknown_arguments
from fastprefix.encoders.direct import DirectEncoder, SharedEncoder
from fastprefix.encoders.encoder import Encoder
from fastprefix.encoders.lstm import LSTMEncoder
from fastprefix.encoders.mlp import MLPEncoder
from fastprefix.kv import LayerShape

Reparameterization = Literal["MLP", "LSTM"]


@refuses_unknown_arguments
def slot_lengths(
    num_slots: int,
    num_virtual_tokens: int,
    layers: Sequence[int] | None = None,
    layer_lengths: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """How many virtual tokens each attention layer gets.

    Args:
        num_slots: attention layers of the model.
        num_virtual_tokens: of every layer that gets a prefix.
        layers: those that do; all if None.
        layer_lengths: of each layer, instead.

    Raises:
        ValueError: layers or layer_lengths do not fit the model.
    """
    if layer_lengths is not None:
        if len(layer_lengths) != num_slots:
            raise ValueError(
                f"layer_lengths: got {len(layer_lengths)} of them, takes one for each of the "
                f"model's {num_slots} attention layers"
            )
        return tuple(layer_lengths)
    if layers is None:
        return (num_virtual_tokens,) * num_slots
    if max(layers) >= num_slots:
        raise ValueError(
            f"layers: got {max(layers)}, takes 0 to {num_slots - 1} for this model's "
            f"{num_slots} attention layers"
        )
    return tuple(num_virtual_tokens if slot in layers else 0 for slot in range(num_slots))


@refuses_unknown_arguments
def build_encoder(
    shapes: Sequence[LayerShape],
    lengths: int | Sequence[int],
    *,
    embedding_size: int,
    prefix_projection: bool = False,
    encoder_reparameterization_type: Reparameterization = "MLP",
    encoder_hidden_size: int | None = None,
    encoder_num_layers: int = 2,
    encoder_per_layer: bool = False,
    encoder_orthogonal: bool = False,
    share_layers: bool = False,
    position_offset: int | None = None,
    dropout: float = 0.0,
    num_frozen_tokens: int = 0,
    init_std: float = 0.02,
) -> Encoder:
    """A new encoder.

    Args:
        shapes: see :class:`Encoder`.
        lengths: see :class:`Encoder`.
        embedding_size: the networks' input, the model's hidden size.
        prefix_projection: a network that computes the prefix, instead of the prefix itself.
        encoder_reparameterization_type: which, "MLP" or "LSTM".
        encoder_hidden_size: its hidden size; embedding_size if None.
        encoder_num_layers: linear layers of the MLP, or layers of the LSTM.
        encoder_per_layer: an MLP for every attention layer.
        encoder_orthogonal: the network's weights start orthogonal.
        share_layers: one block of keys and values for all layers; without a network.
        position_offset: see :class:`Encoder`.
        dropout: see :class:`Encoder`.
        num_frozen_tokens: see :class:`Encoder`.
        init_std: standard deviation of the prefix at its random start.

    Raises:
        ValueError: see :class:`Encoder`.
    """
    options: dict[str, Any] = {
        "position_offset": position_offset,
        "dropout": dropout,
        "num_frozen_tokens": num_frozen_tokens,
        "init_std": init_std,
    }
    if not prefix_projection:
        direct = SharedEncoder if share_layers else DirectEncoder
        return direct(shapes, lengths, **options)
    network: dict[str, Any] = {
        "embedding_size": embedding_size,
        "hidden_size": encoder_hidden_size or embedding_size,
        "num_layers": encoder_num_layers,
        "orthogonal": encoder_orthogonal,
    }
    if encoder_reparameterization_type == "LSTM":
        return LSTMEncoder(shapes, lengths, **network, **options)
    return MLPEncoder(shapes, lengths, per_layer=encoder_per_layer, **network, **options)
