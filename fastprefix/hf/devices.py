"""The device and dtype that a model computes with, wherever its weights are between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def device_of(model: PreTrainedModel) -> torch.device:
    """The device that a model's inputs go to.

    This is the device of its first weight, with two exceptions. If accelerate offloads the model,
    it is where accelerate's hooks bring the weights. A replica made by nn.DataParallel has no
    parameters; it is the device of the tensors that replace them. A model without weights is on the
    meta device.
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
    """The dtype of the weights of a model or a replica."""
    if not is_replica(model):
        return model.dtype
    return next(x.dtype for x in _weights(model) if x.is_floating_point())


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings weights of a module for the time that it runs only."""
    absent = any(x.is_meta for x in module.parameters())
    return absent and any(map(_hooks_of, module.modules()))


def is_replica(module: nn.Module) -> bool:
    """Whether nn.DataParallel made this module as a replica for one of its threads."""
    return getattr(module, "_is_replica", False)


def _weights(model: nn.Module) -> list[torch.Tensor]:
    """The tensors that a replica has in place of parameters."""
    parts: Any = model.modules()
    return [x for part in parts for x in getattr(part, "_former_parameters", {}).values()]


def _hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of accelerate on a module; a SequentialHook holds several."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]
