"""Parameterisations of a prefix. Each is a module that, called, gives a :class:`PrefixKV`."""

from fastprefix.encoders.base import Encoder, evaluating
from fastprefix.encoders.build import build_encoder, slot_lengths
from fastprefix.encoders.direct import DirectEncoder, SharedEncoder
from fastprefix.encoders.init import orthogonal, resize
from fastprefix.encoders.lstm import LSTMEncoder
from fastprefix.encoders.mlp import MLPEncoder
from fastprefix.encoders.network import NetworkEncoder
from fastprefix.encoders.reweighting import HeadNumbers

__all__ = [
    "DirectEncoder",
    "Encoder",
    "HeadNumbers",
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
