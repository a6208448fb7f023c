"""Convolution and recurrent states, which some layers keep of a prompt beside keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from fastprefix.arguments import check_type, methods_refuse_unknown_arguments


@methods_refuse_unknown_arguments
@dataclass(frozen=True, eq=False)
class LayerState:
    """The state of one layer behind a prompt. Each row of a batch gets a copy.

    Attributes:
        layer: the index of the layer in the model's cache.
        tensors: the state's tensors by kind, for example "conv.0" or "recurrent.0". They have no
            batch dimension, and each has its own dtype.

    Raises:
        TypeError: a value is not a floating-point tensor.
        ValueError: layer is negative, or there are no tensors.
    """

    layer: int
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        if self.layer < 0 or not self.tensors:
            raise ValueError(
                f"states: got layer {self.layer} with {len(self.tensors)} tensors, takes a layer "
                "of the cache, from 0, with at least one"
            )
        for name, tensor in self.tensors.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise TypeError(f"states: {name} of layer {self.layer} is no floating-point tensor")

    def __reduce__(self) -> Any:
        return type(self), (self.layer, dict(self.tensors))

    def map(self, change: Callable[[Tensor], Tensor]) -> LayerState:
        """Applies a function to every tensor."""
        return LayerState(self.layer, {name: change(x) for name, x in self.tensors.items()})


States = tuple[LayerState, ...]


def checked(states: Sequence[LayerState] | None, like: Tensor) -> States | None:
    """Checks states and returns them as a tuple.

    Args:
        states: the states; None for none.
        like: a key of the prefix, which has the device that states must have.

    Raises:
        TypeError: an entry is not a LayerState.
        ValueError: states are empty, have a layer twice, or are on another device.
    """
    if states is None:
        return None
    check_type("states", states, Iterable, "LayerState objects, or None")
    states = tuple(states)
    if not all(isinstance(one, LayerState) for one in states):
        got = sorted({type(one).__name__ for one in states})
        raise TypeError(f"states: got {', '.join(got)}, takes LayerState objects, or None")
    layers = [one.layer for one in states]
    if not states or len(set(layers)) != len(layers):
        raise ValueError(f"states: got layers {layers}, takes each once, at least one, or None")
    for one in states:
        for name, tensor in one.tensors.items():
            if tensor.device != like.device:
                raise ValueError(
                    f"states: {name} of layer {one.layer} is on {tensor.device}, takes "
                    f"{like.device} as keys[0]"
                )
    return states


def mapped(states: States | None, change: Callable[[Tensor], Tensor]) -> States | None:
    """Applies a function to every tensor of all states."""
    return None if states is None else tuple(one.map(change) for one in states)


def tensors_of(states: States | None) -> tuple[Tensor, ...]:
    """All tensors of all states."""
    return tuple(x for one in states or () for x in one.tensors.values())


def named(states: States | None) -> dict[str, Tensor]:
    """All tensors, by their names in a file."""
    return {
        f"states.{one.layer}.{name}": x for one in states or () for name, x in one.tensors.items()
    }


def outline(states: States | None) -> list[list[Any]] | None:
    """The layers of states with the names of their tensors, for a file's metadata."""
    return None if states is None else [[one.layer, list(one.tensors)] for one in states]


def restored(about: list[list[Any]] | None, read: Callable[[str], Tensor]) -> States | None:
    """Reads states from a file.

    Args:
        about: what :func:`outline` returned.
        read: reads a tensor by its name in the file.
    """
    if about is None:
        return None
    return tuple(
        LayerState(int(layer), {name: read(f"states.{layer}.{name}") for name in names})
        for layer, names in about
    )
