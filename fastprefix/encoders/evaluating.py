"""A module in evaluation mode, while other threads train it."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from fastprefix.arguments import refuses_unknown_arguments

_Module = TypeVar("_Module", bound=nn.Module)


@refuses_unknown_arguments
def evaluating(module: _Module) -> _Module:
    """Returns a module in evaluation mode that has the same parameters.

    If the module is in training mode, this is a second object, and the module itself stays in that
    mode, because other threads may be running it.
    """
    if not module.training:
        return module
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__, training=False)
    twin.__dict__["_modules"] = {
        name: None if part is None else evaluating(part) for name, part in module._modules.items()
    }
    return twin
