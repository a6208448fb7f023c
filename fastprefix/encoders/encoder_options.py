"""What an encoder is like, as one value, and the encoder that is built from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastprefix.arguments import methods_refuse_unknown_arguments, refuses_unknown_arguments
from fastprefix.encoders.direct import DirectEncoder, SharedEncoder
from fastprefix.encoders.encoder import Encoder
from fastprefix.encoders.lstm import LSTMEncoder
from fastprefix.encoders.mlp import MLPEncoder
from fastprefix.encoders.networks import Reparameterization
from fastprefix.kv import LayerShape


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class EncoderOptions:
    """What an encoder is like. The names are those of :class:`fastprefix.PrefixConfig`.

    Attributes:
        prefix_projection: whether a network computes the prefix. Otherwise the prefix itself is
            the parameter.
        encoder_reparameterization_type: the kind of network, "MLP" or "LSTM".
        encoder_hidden_size: the network's hidden size; the width of its input if None.
        encoder_num_layers: the number of linear layers of the MLP, or of layers of the LSTM.
        encoder_per_layer: whether every attention layer has an MLP of its own.
        encoder_orthogonal: whether the network's weights start orthogonal.
        share_layers: whether all layers share one block of keys and values; not with a network.
        position_offset: see :class:`Encoder`.
        dropout: see :class:`Encoder`.
        num_frozen_tokens: see :class:`Encoder`.
        init_std: the standard deviation of the prefix at its random start.
    """

    prefix_projection: bool = False
    encoder_reparameterization_type: Reparameterization = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_per_layer: bool = False
    encoder_orthogonal: bool = False
    share_layers: bool = False
    position_offset: int | None = None
    dropout: float = 0.0
    num_frozen_tokens: int = 0
    init_std: float = 0.02


@refuses_unknown_arguments
def build_encoder(
    shapes: Sequence[LayerShape],
    lengths: int | Sequence[int],
    options: EncoderOptions | None = None,
    *,
    embedding_size: int,
) -> Encoder:
    """Builds a new encoder.

    Args:
        shapes: see :class:`Encoder`.
        lengths: see :class:`Encoder`.
        options: what the encoder is like; the defaults if None.
        embedding_size: the width of a network's input, which is the model's hidden size.

    Raises:
        ValueError: see :class:`Encoder`.
    """
    options = EncoderOptions() if options is None else options
    common: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("position_offset", "dropout", "num_frozen_tokens", "init_std")
    }
    if not options.prefix_projection:
        direct = SharedEncoder if options.share_layers else DirectEncoder
        return direct(shapes, lengths, **common)
    common |= {
        "embedding_size": embedding_size,
        "hidden_size": options.encoder_hidden_size or embedding_size,
        "num_layers": options.encoder_num_layers,
        "orthogonal": options.encoder_orthogonal,
    }
    if options.encoder_reparameterization_type == "LSTM":
        return LSTMEncoder(shapes, lengths, **common)
    return MLPEncoder(shapes, lengths, per_layer=options.encoder_per_layer, **common)
