"""Modules with trainable parameters that compute a :class:`PrefixKV` when they are called."""

from fastprefix.encoders.direct import DirectEncoder, SharedEncoder
from fastprefix.encoders.encoder import Encoder
from fastprefix.encoders.encoder_options import EncoderOptions, build_encoder
from fastprefix.encoders.evaluating import evaluating
from fastprefix.encoders.head_parameters import HeadParameters
from fastprefix.encoders.layer_lengths import slot_lengths
from fastprefix.encoders.lstm import LSTMEncoder
from fastprefix.encoders.mlp import MLPEncoder
from fastprefix.encoders.network_encoder import NetworkEncoder
from fastprefix.encoders.starting_prefixes import orthogonal, resize

__all__ = [
    "DirectEncoder",
    "Encoder",
    "EncoderOptions",
    "HeadParameters",
    "LSTMEncoder",
    "MLPEncoder",
    "NetworkEncoder",
    "SharedEncoder",
    "build_encoder",
    "evaluating",
    "orthogonal",
    "resize",
    "slot_lengths",
]
