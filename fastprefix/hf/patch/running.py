"""Forwards of other threads, while a model is patched for a block and restored after it.

A forward makes its masks first. Every layer then looks up which attention function to call with
them. Our function understands the masks of all implementations, but other functions do not
understand ours. So no forward may begin while a model is tried with one and the other, and the
model may not be restored while a forward that began with our masks still runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fastprefix.hf.patch.patch import Patch
from fastprefix.hf.patch.threads import ACTIVE

LOCK = threading.RLock()

# Suffix to a Patch's key in ACTIVE: the modules whose forwards this thread is in, innermost last.
_ENTERED = "_entered"


@contextlib.contextmanager
def holding_up_forwards(model: PreTrainedModel) -> Iterator[None]:
    """Has forwards of other threads wait for the end of this block, which holds :data:`LOCK`."""
    with LOCK:
        handles = [part.register_forward_pre_hook(_wait) for part in _models(model)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _wait(*_: Any) -> None:
    if not torch.compiler.is_compiling():
        with LOCK:
            pass


def announce_forwards(model: PreTrainedModel, patch: Patch) -> None:
    """Registers the hooks with which :func:`count_forwards` sees forwards begin.

    They must run before all other hooks of a patch, and so must be registered before them:
    ``prepend=True`` gives PyTorch 2.9's compiler another order of hooks than it runs them in.
    """
    for part in _models(model):
        patch.handles.append(part.register_forward_pre_hook(partial(_enter, patch=patch)))


def count_forwards(
    model: PreTrainedModel, patch: Patch, restore: Callable[[PreTrainedModel], Any]
) -> None:
    """Counts the forwards of a model whose patch is not lasting.

    If all blocks have ended before, the last forward restores the model.

    Args:
        model: just patched.
        patch: the model's.
        restore: undoes the patch.
    """
    for part in _models(model):
        leave = partial(_leave, patch=patch, model=model, restore=restore)
        patch.handles.append(part.register_forward_hook(leave, always_call=True))
    patch.counting = True


def _enter(module: nn.Module, args: Any, *, patch: Patch) -> None:
    if torch.compiler.is_compiling() or not patch.counting:
        return
    with LOCK:
        patch.running += 1
    entered = getattr(ACTIVE, patch.key + _ENTERED, ())
    setattr(ACTIVE, patch.key + _ENTERED, (*entered, id(module)))


def _leave(
    module: nn.Module,
    args: Any,
    output: Any,
    *,
    patch: Patch,
    model: PreTrainedModel,
    restore: Callable[[PreTrainedModel], Any],
) -> None:
    entered = getattr(ACTIVE, patch.key + _ENTERED, ())
    if not entered or entered[-1] != id(module):
        return  # began before the model was patched, or is compiled
    setattr(ACTIVE, patch.key + _ENTERED, entered[:-1])
    if len(entered) == 1:
        delattr(ACTIVE, patch.key + _ENTERED)
    with LOCK:
        patch.running -= 1
        if not (patch.running or patch.blocks or patch.lasting):
            restore(model)


def _models(model: PreTrainedModel) -> list[nn.Module]:
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]
