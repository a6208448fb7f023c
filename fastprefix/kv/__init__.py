"""Prefixes as keys and values: one for every layer of a model."""

from fastprefix.kv.prefix import LayerShape, PrefixKV

__all__ = ["LayerShape", "PrefixKV"]
