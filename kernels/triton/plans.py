"""Launch plans: what a call launches, kept for calls that differ from it only in their tensors.

What the launchers do follows from the shapes, strides, dtypes and alignment of the tensors, from
the options, and from the device. So the first call of a kind runs them and Triton's JIT, and keeps
the compiled kernels with their arguments. A later call looks its kind up, allocates, writes the
addresses of its tensors into the arguments and launches.

A call is planned only if everything its kernels read or write is one of its tensors, one of its
results, or memory from :func:`~fastprefix.kernels.launch.scratch`, or a part of one. A call that
copies an operand runs the launchers every time; so does Triton's interpreter.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from fastprefix.options import TOLD, Options

from . import launch
from .plan_cache import PLANS

Results = tuple[Tensor | None, ...]
# Scratch tensors begin at multiples of this many bytes, more than any vector load asks for.
ALIGNMENT = 128
# In place of a plan: a call of this kind has none.
UNPLANNED = False

runtime = triton.knobs.runtime
told = operator.attrgetter(*TOLD)
INTERPRETED = runtime.interpret


class Allocation(NamedTuple):
    """A result: shape, strides and dtype."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Step(NamedTuple):
    """A launch.

    Attributes:
        compiled: the kernel.
        grid: programs along each axis.
        run: of the compiled kernel; it takes what JITFunction.run passes to it.
        code: the kernel's function on the device, and what Triton packed with it.
        arguments: picks the arguments, in order, from a list of addresses and values.
    """

    compiled: Any
    grid: tuple[int, int, int]
    run: Callable[..., None]
    code: tuple[Any, Any]
    arguments: Callable[[list[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Plan:
    """What a kind of call launches.

    Addresses are numbered: first the tensors of the call (query, key and so on, then those of the
    options), then the results, then the parts of the scratch memory.

    Attributes:
        results: what to allocate and return; None where nothing is returned.
        scratch: bytes of scratch memory.
        offsets: where its parts begin.
        values: the arguments that are no addresses of the above.
        steps: the launches, in order.
        views: where among all arguments the address of a part of a tensor goes, the number of the
            tensor, and how many bytes into it the part begins.
    """

    results: tuple[Allocation | None, ...]
    scratch: int
    offsets: tuple[int, ...]
    values: tuple[Any, ...]
    steps: tuple[Step, ...]
    views: tuple[tuple[int, int, int], ...] = ()

    def run(self, query: Tensor, addresses: list[int]) -> Results:
        """Allocates and launches; `addresses` are those of the call's tensors."""
        results: list[Tensor | None] = []
        for made in self.results:
            if made is None:
                results.append(None)
            else:
                result = query.new_empty_strided(made.shape, made.strides, dtype=made.dtype)
                results.append(result)
                addresses.append(result.data_ptr())
        if self.scratch:
            # Freed when this returns: the allocator hands it out again in the order of the stream.
            scratch = query.new_empty(self.scratch, dtype=torch.uint8)
            start = scratch.data_ptr()
            addresses += [start + offset for offset in self.offsets]
        pool = [*addresses, *self.values]
        for place, number, offset in self.views:
            pool[place] = addresses[number] + offset
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        told = getattr(enter, "calls", enter)  # a profiler, which wants to know more
        for compiled, grid, run, code, arguments in self.steps:
            chosen = arguments(pool)
            metadata = compiled.launch_metadata(grid, stream, *chosen) if told else None
            run(*grid, stream, *code, metadata, enter, leave, *chosen)
        return tuple(results)


def planned(
    launcher: Callable[..., Results],
    tensors: tuple[Tensor, ...],
    options: Options,
    needs: tuple[bool, ...] = (),
) -> Any:
    """`launcher(*tensors, options[, needs])`, by its plan if there is one.

    Args:
        launcher: allocates its results with :func:`torch.empty` and fills them only by
            :class:`~fastprefix.kernels.launch.Launch`.
        tensors: of the call, those of the options aside.
        options: of the call.
        needs: which gradients are needed, for a backward.
    """
    rest = (options, needs) if needs else (options,)
    if INTERPRETED or launch.collecting():
        return launcher(*tensors, *rest)
    inside = [each for each in options if each is not None and isinstance(each, Tensor)]
    every = (*tensors, *inside)
    addresses = [tensor.data_ptr() for tensor in every]
    key = key_of(launcher, every, addresses, options, needs)
    plan = PLANS.get(key)
    if plan is not None:
        return plan.run(tensors[0], addresses) if plan else launcher(*tensors, *rest)
    if len(set(map(id, tensors))) < len(tensors):
        # One tensor stands in two places, as key and value may: here each place gets its own.
        tensors = tuple([x.detach() for x in tensors])
    with launch.recorded() as record:
        results = launcher(*tensors, *rest)
    PLANS.keep(key, plan_of((*tensors, *inside), results, record) or UNPLANNED)
    return results


def known(launcher: Callable[..., Results], tensors: tuple[Tensor, ...], options: Options) -> Any:
    """What :func:`planned` returns if the call has a plan, otherwise None.

    Args:
        launcher: see :func:`planned`.
        tensors: of the call; not checked.
        options: not checked, with no tensors but perhaps those that are
            :data:`~fastprefix.options.TOLD`.
    """
    if launch.collecting():
        return None
    mask, lengths, spans = told(options)
    every = tensors if mask is None else (*tensors, mask)
    every = every if lengths is None else (*every, lengths)
    every = every if spans is None else (*every, spans)
    try:
        addresses = [tensor.data_ptr() for tensor in every]
        plan = PLANS.get(key_of(launcher, every, addresses, options, ()))
    except (AttributeError, TypeError):  # something is no tensor
        return None
    return plan.run(tensors[0], addresses) if plan else None


def key_of(
    launcher: Any,
    tensors: tuple[Tensor, ...],
    addresses: list[int],
    options: Options,
    needs: tuple[bool, ...],
) -> Any:
    """Everything that a plan depends on."""
    first = tensors[0]
    dtype = first.dtype
    unaligned = 0
    for address in addresses:
        unaligned |= address
    return (
        launcher,
        needs,
        first.device,
        *[tensor.get_device() for tensor in tensors],
        *[tensor.shape for tensor in tensors],
        *[tensor.stride() for tensor in tensors],
        *[tensor.dtype for tensor in tensors],
        # Triton compiles other code for addresses that are multiples of 16.
        unaligned & 15 and tuple([address & 15 for address in addresses]),
        dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32,
        # A tensor is described above; here it only says that the option is used.
        *[
            None if each is None else Tensor if isinstance(each, Tensor) else each
            for each in options
        ],
    )


def plan_of(tensors: Sequence[Tensor], results: Results, record: launch.Record) -> Plan | None:
    """The plan of a call that was recorded; None if it has none."""
    made = [result for result in results if result is not None]
    numbers = _numbers([*tensors, *made, *record.scratch])
    if numbers is None or not record.launches:
        return None
    pool: list[Any] = [None] * (len(tensors) + len(made) + len(record.scratch))
    first_value = len(pool)
    views: list[tuple[int, int, int]] = []
    steps: list[Step] = []
    seen: set[int] = set()
    try:
        for launched, compiled in record.launches:
            if compiled is None:
                return None
            places = _places(_arguments(launched), numbers, pool, views)
            seen.update(_flat(places), (number for _, number, _ in views))
            x, y, z = (*launched.grid, 1, 1)[:3]
            code = (compiled.function, compiled.packed_metadata)
            steps.append(Step(compiled, (x, y, z), compiled.run, code, picker(places)))
    except LookupError:
        return None
    first = len(tensors)
    if any(x.numel() and first + i not in seen for i, x in enumerate(made)):
        return None  # filled by something that was not recorded
    offsets, size = offsets_of(record.scratch)
    allocations = tuple(
        None if x is None else Allocation(tuple(x.shape), x.stride(), x.dtype) for x in results
    )
    values = tuple(pool[first_value:])
    return Plan(allocations, size, offsets, values, tuple(steps), tuple(views))


def _places(
    arguments: Sequence[Any],
    number_of: Callable[[Tensor], tuple[int, int] | None],
    pool: list[Any],
    views: list[tuple[int, int, int]],
) -> list[Any]:
    """Where arguments stand in the list that a plan picks them from; a tuple for a group of them.

    Tensors have their number. Parts of a tensor, which are noted in `views`, and what is no tensor
    are added to the end of the list.

    Raises:
        LookupError: a tensor has no number.
    """
    places: list[Any] = []
    for argument in arguments:
        if argument is None or type(argument) is int:  # most of them
            places.append(len(pool))
            pool.append(argument)
        elif isinstance(argument, Tensor):
            found = number_of(argument)
            if found is None:
                raise LookupError
            number, offset = found
            if offset:
                views.append((len(pool), number, offset))
                number = len(pool)
                pool.append(None)
            places.append(number)
        elif isinstance(argument, tuple):
            places.append(tuple(_places(argument, number_of, pool, views)))
        else:
            places.append(len(pool))
            pool.append(argument)
    return places


def _flat(places: Sequence[Any]) -> Iterator[int]:
    for place in places:
        if isinstance(place, tuple):
            yield from _flat(place)
        else:
            yield place


def _numbers(tensors: Sequence[Tensor]) -> Callable[[Tensor], tuple[int, int] | None] | None:
    """The number of a tensor among these, by identity or by memory, and where it begins in bytes.

    None if one tensor stands in two places: which of the two a kernel reads cannot be told.
    """
    by_identity = {id(tensor): number for number, tensor in enumerate(tensors)}
    if len(by_identity) < len(tensors):
        return None

    def number_of(tensor: Tensor) -> tuple[int, int] | None:
        number = by_identity.get(id(tensor))
        if number is not None:
            return number, 0
        if not tensor.numel():
            return None
        # It may be a view of one of them, such as a mask that was expanded, or a part.
        address = tensor.data_ptr()
        at = [i for i, x in enumerate(tensors) if x.numel() and x.data_ptr() == address]
        if not at and tensor.is_contiguous():
            last = address + tensor.nbytes
            at = [
                i for i, x in enumerate(tensors)
                if x.is_contiguous() and x.data_ptr() < address and last <= x.data_ptr() + x.nbytes
            ]  # fmt: skip
        return (at[0], address - tensors[at[0]].data_ptr()) if len(at) == 1 else None

    return number_of


def picker(places: list[Any]) -> Callable[[list[Any]], Sequence[Any]]:
    """What picks arguments from a list by their places; a tuple of places makes a tuple."""
    if tuple not in map(type, places):
        return operator.itemgetter(*places)
    parts = []
    for grouped, run in itertools.groupby(places, lambda place: isinstance(place, tuple)):
        if grouped:
            parts += [(True, _tuple_picker(group)) for group in run]
        else:
            parts.append((False, _tuple_picker(tuple(run))))

    def pick(pool: list[Any]) -> list[Any]:
        picked: list[Any] = []
        for grouped, part in parts:
            if grouped:
                picked.append(part(pool))
            else:
                picked += part(pool)
        return picked

    return pick


def _tuple_picker(places: tuple[Any, ...]) -> Callable[[list[Any]], tuple[Any, ...]]:
    if tuple in map(type, places):
        pick = picker(list(places))
        return lambda pool: tuple(pick(pool))
    if len(places) == 1:
        (place,) = places
        return lambda pool: (pool[place],)
    return operator.itemgetter(*places)


def _arguments(launched: launch.Launch) -> list[Any]:
    """All arguments of a launch in the order of the kernel's parameters."""
    given = {**launched.arguments, **launched.constants}
    return [given[name] for name in launched.kernel.arg_names]


def offsets_of(scratch: Sequence[Tensor]) -> tuple[tuple[int, ...], int]:
    """Where each begins in one allocation, and the bytes of all of them."""
    offsets, end = [], 0
    for tensor in scratch:
        offsets.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(offsets), end
