"""Compares two runs of a model, attention module by attention module.

In the second run each attention module gets the inputs that it got in the first run. Its output is
compared with its output in the first run, and then replaced by that. So rounding errors do not add
up from layer to layer, and an error shows where it is made and in full size.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprefix.hf.devices import device_of
from fastprefix.hf.evaluation import evaluating

_INPUT = "hidden_states"


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an attention module.

    Attributes:
        module: the module.
        given: the hidden states that it received, and arguments of the same shape (MobileBERT's
            queries, keys and values), by the name or the number of the argument.
        made: the first tensor of its output.
    """

    module: nn.Module
    given: dict[str | int, Tensor]
    made: Tensor


@dataclass(eq=False)
class Trace:
    """The calls of attention modules in a run, in their order."""

    calls: list[Call] = field(default_factory=list)


@contextlib.contextmanager
def recorded(modules: Iterable[nn.Module]) -> Iterator[Trace]:
    """Keeps what the modules receive and make, in this block and this thread."""
    trace, thread = Trace(), threading.get_ident()

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        made = _first(output)
        if threading.get_ident() == thread and made is not None:
            trace.calls.append(Call(module, _given(args, kwargs), made))

    handles = [m.register_forward_hook(keep, with_kwargs=True) for m in dict.fromkeys(modules)]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def held_to(
    trace: Trace, begin: Callable[[int], int], judge: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    """Gives the traced modules their inputs and outputs of the trace, in this block and thread.

    Args:
        trace: a trace of the same model.
        begin: returns, for the number of a call in the trace, the first token that the call has in
            this block. It has all tokens that follow.
        judge: called with the number of a call, its output, and its output in the trace.

    Raises:
        RuntimeError: at the end of the block, if a module ran more or less often than in the trace.
    """
    thread = threading.get_ident()
    numbers: dict[nn.Module, list[int]] = {}
    for number, call in enumerate(trace.calls):
        numbers.setdefault(call.module, []).append(number)
    entered: Counter[nn.Module] = Counter()
    left: Counter[nn.Module] = Counter()

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != thread:
            return None
        turn, entered[module] = entered[module], entered[module] + 1
        if turn >= len(numbers[module]):
            return None
        number = numbers[module][turn]
        now = _given(args, kwargs)
        wanted = {
            place: x[:, begin(number) :]
            for place, x in trace.calls[number].given.items()
            if place in now and x[:, begin(number) :].shape == now[place].shape
        }
        return _replaced(args, kwargs, wanted) if wanted else None

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        turn, left[module] = left[module], left[module] + 1
        made = _first(output)
        if turn >= len(numbers[module]) or made is None:
            return None
        number = numbers[module][turn]
        want = trace.calls[number].made[:, begin(number) :]
        judge(number, made, want)
        return _with_first(output, want) if want.shape == made.shape else None

    handles = []
    for module in numbers:
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for module, calls in numbers.items():
        if left[module] != len(calls):
            raise RuntimeError(
                f"{type(module).__name__} ran {left[module]} times where it had run "
                f"{len(calls)} times"
            )


@contextlib.contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation without gradients and autocast; modes and random state are put back."""
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with (
        evaluating(model),
        torch.random.fork_rng(devices),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def result_of(output: Any) -> Tensor | None:
    """The first floating-point tensor of a model's output: its logits, or its hidden states."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if hasattr(output, "values") else output
    found = (x for x in values if isinstance(x, Tensor) and x.is_floating_point() and x.dim())
    return next(found, None)


def _given(args: Any, kwargs: dict[str, Any]) -> dict[str | int, Tensor]:
    """The hidden states [B, L, width] among a call's arguments, and arguments of the same shape.

    Other keyword arguments are left out. In cross-attention they are the encoder's states, whose
    errors must show.
    """
    first = args[0] if args else kwargs.get(_INPUT)
    if not isinstance(first, Tensor) or first.dim() != 3:
        return {}
    if not args:
        return {_INPUT: first}
    return {
        place: x
        for place, x in enumerate(args)
        if isinstance(x, Tensor) and x.shape == first.shape and x.dtype == first.dtype
    }


def _replaced(args: Any, kwargs: dict[str, Any], given: dict[str | int, Tensor]) -> Any:
    positional = tuple(given.get(place, x) for place, x in enumerate(args))
    return positional, {name: given.get(name, x) for name, x in kwargs.items()}


def _first(output: Any) -> Tensor | None:
    found = output[0] if isinstance(output, (tuple, list)) and output else output
    return found if isinstance(found, Tensor) and found.dim() == 3 else None


def _with_first(output: Any, made: Tensor) -> Any:
    if isinstance(output, Tensor):
        return made
    return type(output)((made, *output[1:]))
