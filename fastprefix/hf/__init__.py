"""Hugging Face models: attention, masks, patching, prefill, PEFT's file format."""

from fastprefix.hf.patching import (
    UnsupportedModelError,
    is_patched,
    layer_groups,
    layer_shapes,
    layer_sources,
    patch_model,
    unpatch_model,
    use_prefix,
)

__all__ = [
    "UnsupportedModelError",
    "is_patched",
    "layer_groups",
    "layer_shapes",
    "layer_sources",
    "patch_model",
    "unpatch_model",
    "use_prefix",
]
