"""Prefixes as keys and values: one for every layer of a model, and several by name."""

from fastprefix.kv.arithmetic import concatenate, interpolate, orthogonality_penalty
from fastprefix.kv.bank import PrefixBank
from fastprefix.kv.budget import Eviction, KVBudget, KVBudgetError
from fastprefix.kv.flat import FlatLayout, flat_width, to_flat, to_prefix_kv
from fastprefix.kv.packed import PackedPrefixKV
from fastprefix.kv.plan import KVPlan, plan_kv_bytes
from fastprefix.kv.prefix import PrefixKV
from fastprefix.kv.reweighting import Reweighting
from fastprefix.kv.shapes import Group, LayerShape
from fastprefix.kv.states import LayerState

__all__ = [
    "Eviction",
    "FlatLayout",
    "Group",
    "KVBudget",
    "KVBudgetError",
    "KVPlan",
    "LayerShape",
    "LayerState",
    "PackedPrefixKV",
    "PrefixBank",
    "PrefixKV",
    "Reweighting",
    "concatenate",
    "flat_width",
    "interpolate",
    "orthogonality_penalty",
    "plan_kv_bytes",
    "to_flat",
    "to_prefix_kv",
]
