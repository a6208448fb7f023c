"""What transformers renamed between the releases that fastprefix runs with, in one place.

The floor is transformers 5.17. Release 5.23 renamed gradient checkpointing to activation
checkpointing. Release 5.24 renamed the models' ``past_key_values`` to ``cache``
and the position embeddings' ``past_key_values_length`` to ``cache_length``; callers may still use
the old name of the first, and adapters saved under one release load under another.
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

# The forwards' argument that holds earlier keys and values, newest name first.
CACHE_NAMES = ("cache", "past_key_values")
# What a position embedding's forward calls the number of keys that are in the cache.
_CACHED_NAMES = ("cache_length", "past_key_values_length")


def parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of a forward's parameters, in their order."""
    return tuple(inspect.signature(module.forward).parameters)


def by_name(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """A call's arguments, those that were given by position under the names of parameters."""
    # cut first: Dynamo in torch 2.9 refuses a zip of unequal lengths
    return {**dict(zip(names[: len(args)], args, strict=False)), **kwargs}


def cache_name(names: tuple[str, ...] | list[str]) -> str | None:
    """What a forward with parameters of these names calls its cache; None if it takes none."""
    return next((name for name in CACHE_NAMES if name in names), None)


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache among a call's keyword arguments, under any of its names; None for no cache."""
    found = (kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None)
    return next(found, None)


def length_of(cache: Any) -> Any:
    """How many tokens a cache holds: a number, or a tensor (a static cache); 0 for None."""
    return 0 if cache is None else cache.get_seq_length()


def cached_name(module: nn.Module) -> str | None:
    """The parameter by which a position embedding is told of the keys in the cache, or None."""
    names = parameters(module)
    return next((name for name in _CACHED_NAMES if name in names), None)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Sets the attention implementation of a model and of all its parts.

    Releases before 5.20 leave out the parts that have a config of their own of the model's class,
    as T5's stacks do.
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
    """The ranks that share a layer's heads; release 5.17 names no mesh that is for them alone."""
    mesh = model._device_mesh
    return (mesh["tp"] if mesh.mesh_dim_names else mesh).get_group()


def enable_checkpointing(model: Any, *args: Any, **kwargs: Any) -> None:
    """Has a model recompute activations in the backward: release 5.23 renamed how to ask for it."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)(*args, **kwargs)


def disable_checkpointing(model: Any) -> None:
    """Has a model keep its activations again."""
    new = getattr(model, "activation_checkpointing_disable", None)
    (new or model.gradient_checkpointing_disable)()


def is_checkpointing(model: nn.Module) -> bool:
    """Whether a model recomputes activations; its layers kept the older name for it."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def checkpointing_arguments(**options: Any) -> dict[str, Any]:
    """What TrainingArguments take to recompute activations, with options of torch's function."""
    from transformers import TrainingArguments  # loads much that inference does not need

    known = {field.name for field in fields(TrainingArguments)}
    name = next(n for n in ("activation", "gradient") if f"{n}_checkpointing" in known)
    return {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": options}


def peft_mismatch() -> str | None:
    """Why PEFT's own models are not to be relied on with the installed transformers, or None.

    transformers says which PEFT it takes. With an older one PEFT's ``generate()`` may run without
    its prefix and not say so. fastprefix reads and writes PEFT's files with any.
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
