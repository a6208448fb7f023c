"""The operator: :func:`prefix_attention` and its backends. Needs torch alone."""

from fastprefix.attention.api import prefix_attention

__all__ = ["prefix_attention"]
