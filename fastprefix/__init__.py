"""Attention over shared prefixes: one copy of a prefix's keys and values, never expanded.

Everything is imported when first used: the operator needs torch alone, what works on Hugging Face
models transformers besides, and the command line answers ``--help`` without either.
transformers knows ``attn_implementation="fastprefix"`` from here on, whenever it is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastprefix import implementation
from fastprefix.integrations import trl

if TYPE_CHECKING:
    from fastprefix import attention as attention
    from fastprefix import kv as kv
    from fastprefix.attention import prefix_attention
    from fastprefix.hf import UnsupportedModelError, patch_model, unpatch_model, use_prefix
    from fastprefix.kv import KVBudget, PackedPrefixKV, PrefixBank, PrefixKV
    from fastprefix.tuning import (
        PrefixConfig,
        PrefixTuningModel,
        PromptConfig,
        PromptTuningModel,
    )
    from fastprefix.tuning.trainer import PrefixTrainer, PrefixTrainingArguments

__version__ = "0.1.0"

implementation.register()
trl.register()
del trl

_LAZY = {
    "KVBudget": "fastprefix.kv",
    "PackedPrefixKV": "fastprefix.kv",
    "PrefixBank": "fastprefix.kv",
    "PrefixConfig": "fastprefix.tuning",
    "PrefixKV": "fastprefix.kv",
    "PrefixTrainer": "fastprefix.tuning.trainer",
    "PrefixTrainingArguments": "fastprefix.tuning.trainer",
    "PrefixTuningModel": "fastprefix.tuning",
    "PromptConfig": "fastprefix.tuning",
    "PromptTuningModel": "fastprefix.tuning",
    "UnsupportedModelError": "fastprefix.hf",
    "patch_model": "fastprefix.hf",
    "prefix_attention": "fastprefix.attention",
    "unpatch_model": "fastprefix.hf",
    "use_prefix": "fastprefix.hf",
}
_PACKAGES = ("attention", "kv")  # as attributes, without an import of their own

__all__ = [
    "KVBudget",
    "PackedPrefixKV",
    "PrefixBank",
    "PrefixConfig",
    "PrefixKV",
    "PrefixTrainer",
    "PrefixTrainingArguments",
    "PrefixTuningModel",
    "PromptConfig",
    "PromptTuningModel",
    "UnsupportedModelError",
    "__version__",
    "patch_model",
    "prefix_attention",
    "unpatch_model",
    "use_prefix",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"fastprefix.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'fastprefix' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
