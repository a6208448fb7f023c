"""Hugging Face models that attend to a prefix.

- :mod:`fastprefix.hf.patch`: what patching does to a model, and the hooks of its forward.
- :mod:`fastprefix.hf.layer`: what runs in each attention layer.
- :mod:`fastprefix.hf.prefill`: a prompt's keys and values.
- :mod:`fastprefix.hf.states`: models whose layers keep a state of the text.
- :mod:`fastprefix.hf.checking`: whether a patched model computes what it should.
- :mod:`fastprefix.hf.expand`: models whose attention cannot be replaced.
"""

from fastprefix.hf.patch.patch import is_patched, patch_of
from fastprefix.hf.patch.patching import patch_model, unpatch_model, use_prefix
from fastprefix.hf.patch.probe import UnsupportedModelError

__all__ = [
    "UnsupportedModelError",
    "is_patched",
    "patch_model",
    "patch_of",
    "unpatch_model",
    "use_prefix",
]
