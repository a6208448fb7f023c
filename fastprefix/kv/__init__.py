"""Prefixes as keys and values: one for every layer of a model."""

from fastprefix.kv.prefix import Group, LayerShape, PrefixKV

__all__ = ["Group", "LayerShape", "PrefixKV"]
