"""Triton kernels of prefix attention: raw launchers, tensors in, tensors out, no autograd.

Importing this package imports Triton; nothing above imports it before a kernel runs.
"""

import triton

from .backward import launch_backward
from .forward import known_forward, launch_forward, launch_tables
from .spans import launch_spans

if triton.knobs.runtime.interpret:
    from .interpret import repair

    repair()

__all__ = ["known_forward", "launch_backward", "launch_forward", "launch_spans", "launch_tables"]
