"""Triton kernels of prefix attention: raw launchers, tensors in, tensors out, no autograd.

Importing this package imports Triton; nothing above imports it before a kernel runs.
"""

import triton

from .backward import prefix_attention_backward
from .forward import prefix_attention_forward

if triton.knobs.runtime.interpret:
    from .interpret import repair

    repair()

__all__ = ["prefix_attention_backward", "prefix_attention_forward"]
