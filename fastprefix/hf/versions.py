"""What differs between the releases of transformers that fastprefix supports.

The floor is transformers 5.17. Release 5.23 renamed gradient checkpointing to activation
checkpointing. Release 5.24 renamed the models' ``past_key_values`` to ``cache``
and the position embeddings' ``past_key_values_length`` to ``cache_length``. Callers may still use
``past_key_values``. Adapters saved under one release load under another.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

# Names of the argument of a forward that holds the cache, the newest name first.
CACHE_NAMES = ("cache", "past_key_values")
# Names of the argument of a position embedding that holds the number of keys in the cache.
_CACHED_NAMES = ("cache_length", "past_key_values_length")


def parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of a forward's parameters, in their order."""
    return tuple(inspect.signature(module.forward).parameters)


def by_name(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments of a call by name, the positional ones included."""
    # cut first: Dynamo in torch 2.9 refuses a zip of unequal lengths
    return {**dict(zip(names[: len(args)], args, strict=False)), **kwargs}


def cache_name(names: tuple[str, ...] | list[str]) -> str | None:
    """The name of the cache argument among a forward's parameters; None if there is none."""
    return next((name for name in CACHE_NAMES if name in names), None)


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache among a call's keyword arguments, under any of its names; None without one."""
    found = (kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None)
    return next(found, None)


def length_of(cache: Any) -> Any:
    """How many tokens a cache holds: a number, or a tensor for a static cache; 0 for None."""
    return 0 if cache is None else cache.get_seq_length()


def cached_name(module: nn.Module) -> str | None:
    """The parameter of a position embedding that takes the number of cached keys, or None."""
    names = parameters(module)
    return next((name for name in _CACHED_NAMES if name in names), None)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Sets the attention implementation of a model and of all its parts.

    Releases before 5.20 leave out parts that have their own config of the same class as the
    model's, such as T5's stacks.
    """
    model.set_attn_implementation(name)
    for part in model.modules():
        if (
            isinstance(part, PreTrainedModel)
            and type(part.config) is type(model.config)
            and part.config._attn_implementation != name
        ):
            part.set_attn_implementation(name)


def tensor_parallel_group(model: Any) -> Any:
    """The ranks that share a layer's heads. In release 5.17 their mesh has no name."""
    mesh = model._device_mesh
    return (mesh["tp"] if mesh.mesh_dim_names else mesh).get_group()


def enable_checkpointing(model: Any, *args: Any, **kwargs: Any) -> None:
    """Switches gradient checkpointing on; release 5.23 renamed the method."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)(*args, **kwargs)


def disable_checkpointing(model: Any) -> None:
    """Switches gradient checkpointing off."""
    new = getattr(model, "activation_checkpointing_disable", None)
    (new or model.gradient_checkpointing_disable)()


def is_checkpointing(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on; the flag on the layers kept its older name."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def checkpointing_arguments(**options: Any) -> dict[str, Any]:
    """The TrainingArguments that switch gradient checkpointing on, with options for torch."""
    from transformers import TrainingArguments  # loads much that inference does not need

    known = {field.name for field in fields(TrainingArguments)}
    name = next(n for n in ("activation", "gradient") if f"{n}_checkpointing" in known)
    return {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": options}


def peft_mismatch() -> str | None:
    """Why PEFT's own models cannot be relied on with the installed transformers, or None.

    transformers names the oldest PEFT that it supports. With an older one, ``generate()`` of a PEFT
    model may run without its prefix, silently. fastprefix reads and writes PEFT's files with any
    release.
    """
    from transformers.integrations import peft as integration

    try:
        found = version("peft")
    except PackageNotFoundError:
        return "PEFT is not installed"
    least = getattr(integration, "MIN_PEFT_VERSION", "0")
    if Version(found) >= Version(least):
        return None
    return f"transformers {version('transformers')} takes PEFT {least} or newer, got {found}"
