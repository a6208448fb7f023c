"""Attention over shared prefixes: one copy of a prefix's keys and values, never expanded.

The operator needs torch alone; what works on Hugging Face models is imported when first used.
transformers knows ``attn_implementation="fastprefix"`` from here on, whenever it is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastprefix import implementation
from fastprefix.attention import prefix_attention
from fastprefix.integrations import trl
from fastprefix.kv import KVBudget, PackedPrefixKV, PrefixBank, PrefixKV

if TYPE_CHECKING:
    from fastprefix.hf import UnsupportedModelError, patch_model, unpatch_model, use_prefix
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
    "UnsupportedModelError": "fastprefix.hf",
    "patch_model": "fastprefix.hf",
    "unpatch_model": "fastprefix.hf",
    "use_prefix": "fastprefix.hf",
    "PrefixConfig": "fastprefix.tuning",
    "PrefixTrainer": "fastprefix.tuning.trainer",
    "PrefixTrainingArguments": "fastprefix.tuning.trainer",
    "PrefixTuningModel": "fastprefix.tuning",
    "PromptConfig": "fastprefix.tuning",
    "PromptTuningModel": "fastprefix.tuning",
}

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
    if name not in _LAZY:
        raise AttributeError(f"module 'fastprefix' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
