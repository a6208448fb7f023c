"""Parameterisations of a prefix. Each is a module that, called, gives a :class:`PrefixKV`."""

from fastprefix.encoders.direct import DirectEncoder
from fastprefix.encoders.flat import flat_width, to_flat, to_prefix_kv
from fastprefix.encoders.mlp import MLPEncoder

__all__ = ["DirectEncoder", "MLPEncoder", "flat_width", "to_flat", "to_prefix_kv"]
