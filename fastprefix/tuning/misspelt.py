"""Misspelt keyword arguments of a tuned model's calls, which its base would silently ignore."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from fastprefix.arguments import nearest, shown, unknown_argument
from fastprefix.hf.versions import CACHE_NAMES, parameters

# Arguments that forwards pass on by ``**kwargs`` without naming them.
_PASSED_ON = (
    *TransformersKwargs.__annotations__, *CACHE_NAMES, "cache_position", "return_dict", "use_cache",
    "logits_to_keep", "return_loss", "fastprefix",
)  # fmt: skip
# How names begin that can only be meant for us (PEFT calls prefix_names `adapter_names`).
_OURS = ("prefix_", "infix_", "adapter_name")
# A name counts as misspelt from this likeness on. "attn_mask" and "attention_mask" have 0.78.
_LIKENESS = 0.75


def forward_inputs(model: PreTrainedModel, own: Iterable[str]) -> dict[str, bool]:
    """The arguments of a tuned model's forward, and of each whether it is our own.

    Args:
        model: the base. What its forward names, or that of a model inside it, is included.
        own: the names in the signature of the tuned model's own forward.
    """
    inside = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    names = [*_PASSED_ON, *(name for module in (model, *inside) for name in parameters(module))]
    no_names = ("self", "args", "kwargs")
    return dict.fromkeys([n for n in names if n not in no_names], False) | dict.fromkeys(
        [n for n in own if n not in no_names], True
    )


def refuse_misspelt(function: str, given: Mapping[str, Any], known: Mapping[str, bool]) -> None:
    """Refuses unknown names that look like a known one; others are passed on to the base.

    transformers' forwards accept any keyword argument, and most ignore those that they do not know.

    Args:
        function: its name, for the message.
        given: its keyword arguments.
        known: see :func:`forward_inputs`.

    Raises:
        TypeError: an unknown name is like a known one, or can only be meant for us.
    """
    for name in given:
        if name not in known:
            _refuse_if_near(function, name, given[name], known)


def refuse_misspelt_option(
    generate: Callable[..., Any], given: Mapping[str, Any], known: Mapping[str, bool]
) -> None:
    """Does the same for ``generate()``, whose own error for unknown names suggests no other name.

    Args:
        generate: the base's method.
        given: its keyword arguments.
        known: see :func:`forward_inputs`.

    Raises:
        TypeError: see :func:`refuse_misspelt`.
    """
    options = (*inspect.signature(generate).parameters, *GenerationConfig().to_dict())
    refuse_misspelt("generate", given, {**dict.fromkeys(options, False), **known})


def check_tensors(**given: Any) -> None:
    """Refuses inputs of a forward that are no tensors; the base's own error would be less clear.

    Raises:
        TypeError: an input is neither a tensor nor None.
    """
    for name, value in given.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: got {shown(value)}, takes a tensor, or None")


# An unknown name makes torch.compile break its graph here. That is better than to ignore the name.
@torch.compiler.disable
def _refuse_if_near(function: str, name: str, value: Any, known: Mapping[str, bool]) -> None:
    if value is None:
        return
    if name.startswith(_OURS):
        raise unknown_argument(function, name, [n for n, ours in known.items() if ours])
    near = nearest(name, known, _LIKENESS)
    # a name with one more word means another thing: mm_token_type_ids, pixel_attention_mask
    if near is not None and not _within(near, name) and not _within(name, near):
        raise unknown_argument(function, name, [near])


def _within(part: str, whole: str) -> bool:
    return f"_{part}_" in f"_{whole}_"
