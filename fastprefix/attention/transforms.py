"""Derivatives beyond a plain backward: torch.func's transforms, forward mode, second derivatives.

The registered ops of the fused backends have a backward and no other derivative. PyTorch treats an
op without a forward-mode formula as a constant: its tangent would silently be zero. So calls that a
transform differentiates run in their own way (:mod:`fastprefix.attention.differentiated`), and
derivatives without a formula are refused here. The reference backend is plain PyTorch and has all
derivatives.
"""

from __future__ import annotations

import torch
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    retrieve_current_functorch_interpreter,
)
from torch.autograd import forward_ad

_DIFFERENTIATE = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)

FORWARD_MODE = (
    "forward-mode derivatives (torch.func.jvp, jacfwd, linearize, hessian, torch.autograd."
    "forward_ad)"
)
SECOND = "second derivatives (torch.func.hessian, create_graph=True)"
COMPILED = "derivatives that are taken inside torch.compile, or of what it compiled, by torch.func"


def is_differentiated(backend: str) -> bool:
    """Whether a derivative of torch.func, or forward mode, is active.

    vmap and functionalize are no derivatives: they handle registered ops like any others.

    Args:
        backend: of the call, for the message.

    Raises:
        NotImplementedError: torch.compile is tracing, which cannot trace such calls.
    """
    forward_mode = forward_ad._current_level >= 0
    if not forward_mode and not torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        if forward_mode:
            refuse(backend, FORWARD_MODE)
        innermost = retrieve_current_functorch_interpreter()  # all of them cannot be traced
        if innermost.key() in _DIFFERENTIATE or innermost.level() > 1:
            refuse(backend, COMPILED)
        return False
    return forward_mode or any(
        interpreter.key() in _DIFFERENTIATE for interpreter in retrieve_all_functorch_interpreters()
    )


def refuse(backend: str, what: str) -> None:
    """Raises NotImplementedError, naming what the fused backend lacks and the one that has it."""
    raise NotImplementedError(
        f"backend: got {backend!r} for {what}, takes 'reference' (of a model: "
        "patch_model(model, backend='reference'))"
    )
