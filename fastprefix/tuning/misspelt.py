"""Keyword arguments of a tuned model's calls that its base would swallow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from fastprefix.arguments import nearest, shown, unknown_argument
from fastprefix.hf.versions import CACHE_NAMES, parameters

# What forwards hand on although none of them names it.
_HANDED_ON = (
    *TransformersKwargs.__annotations__, *CACHE_NAMES, "cache_position", "return_dict", "use_cache",
    "logits_to_keep", "return_loss", "fastprefix",
)  # fmt: skip
# Beginnings of names that are meant for us, and for no base: PEFT chooses rows by `adapter_names`.
_OURS = ("prefix_", "infix_", "adapter_name")
# How like a known name must be. "attn_mask" is .78 like "attention_mask".
_LIKENESS = 0.75


def forward_inputs(model: PreTrainedModel, own: Iterable[str]) -> dict[str, bool]:
    """What a tuned model's forward takes: whether each name is our own.

    Args:
        model: the base; what it or a model inside it names is taken.
        own: names that the tuned model's forward has itself.
    """
    inside = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    names = [*_HANDED_ON, *(name for module in (model, *inside) for name in parameters(module))]
    no_names = ("self", "args", "kwargs")
    return dict.fromkeys([n for n in names if n not in no_names], False) | dict.fromkeys(
        [n for n in own if n not in no_names], True
    )


def refuse_misspelt(function: str, given: Mapping[str, Any], known: Mapping[str, bool]) -> None:
    """Refuses names that mean something known and are not it; all others are the base's business.

    transformers' forwards take any keyword argument, and most do nothing with one they do not know.

    Args:
        function: its name.
        given: keyword arguments.
        known: see :func:`forward_inputs`.

    Raises:
        TypeError: a name is like a known one, or can be meant for us alone.
    """
    for name in given:
        if name not in known:
            _refuse_if_near(function, name, given[name], known)


def refuse_misspelt_option(
    generate: Callable[..., Any], given: Mapping[str, Any], known: Mapping[str, bool]
) -> None:
    """The same for ``generate()``, which refuses what it does not know, but tells no other name.

    Args:
        generate: the base's.
        given: keyword arguments.
        known: see :func:`forward_inputs`.
    """
    options = (*inspect.signature(generate).parameters, *GenerationConfig().to_dict())
    refuse_misspelt("generate", given, {**dict.fromkeys(options, False), **known})


def check_tensors(**given: Any) -> None:
    """Refuses what is no tensor among a forward's inputs, of which the base would say less.

    Raises:
        TypeError: one is not.
    """
    for name, value in given.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: got {shown(value)}, takes a tensor, or None")


# With a name that nobody knows torch.compile breaks its graph here: better than to miss it.
@torch.compiler.disable
def _refuse_if_near(function: str, name: str, value: Any, known: Mapping[str, bool]) -> None:
    if value is None:
        return
    if name.startswith(_OURS):
        raise unknown_argument(function, name, [n for n, ours in known.items() if ours])
    near = nearest(name, known, _LIKENESS)
    # with a word more it is another thing: mm_token_type_ids, pixel_attention_mask
    if near is not None and not _within(near, name) and not _within(name, near):
        raise unknown_argument(function, name, [near])


def _within(part: str, whole: str) -> bool:
    return f"_{part}_" in f"_{whole}_"
