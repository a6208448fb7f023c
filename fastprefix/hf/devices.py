"""Where a model computes, and in which dtype, wherever its weights are between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def device_of(model: PreTrainedModel) -> torch.device:
    """The device that a model's inputs go to.

    That of its first weight; of one that accelerate offloads, where its hooks bring the weights;
    of a replica that nn.DataParallel made, which has no parameters, that of what it has instead.
    The meta device for a model without weights.
    """
    device = _weights(model)[0].device if is_replica(model) else model.device
    if device.type == "meta":
        for module in model.modules():
            for hook in _hooks_of(module):
                found = getattr(hook, "execution_device", None)
                if found is not None:
                    return torch.device(found)
    return device


def dtype_of(model: PreTrainedModel) -> torch.dtype:
    """The dtype of a model's weights, a replica's among them."""
    if not is_replica(model):
        return model.dtype
    return next(x.dtype for x in _weights(model) if x.is_floating_point())


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights of a module are nowhere but while it runs, when accelerate brings them."""
    absent = any(x.is_meta for x in module.parameters())
    return absent and any(map(_hooks_of, module.modules()))


def is_replica(module: nn.Module) -> bool:
    """Whether nn.DataParallel made this module for one of its threads."""
    return getattr(module, "_is_replica", False)


def _weights(model: nn.Module) -> list[torch.Tensor]:
    """What a replica has for parameters."""
    parts: Any = model.modules()
    return [x for part in parts for x in getattr(part, "_former_parameters", {}).values()]


def _hooks_of(module: nn.Module) -> list[Any]:
    """accelerate's, of which several may stand one behind the other."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]
