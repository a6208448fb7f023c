"""Arguments of ``generate()``: all by name, and with lengths that do not include a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor


def arguments_by_name(
    generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Returns all arguments of a call by name. The first one of ``generate()`` gets input_ids.

    Args:
        generate: the base's method.
        args: the call's positional arguments.
        kwargs: the call's keyword arguments.

    Raises:
        TypeError: there are more positional arguments than the method has.
        ValueError: the input is given twice, or a mask is given in place of generation_config.
    """
    signature = inspect.signature(generate)
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    if isinstance(given.get("generation_config"), Tensor):
        raise ValueError(
            "generation_config: got a Tensor, takes a GenerationConfig; attention_mask goes by name"
        )
    inputs = given.pop("inputs", None)
    if inputs is not None:
        if given.get("input_ids") is not None:
            raise ValueError("inputs, input_ids: got both, takes one of them")
        given["input_ids"] = inputs
    return given


def count_new_tokens(given: dict[str, Any], text_length: int) -> None:
    """Replaces max_length and min_length by max_new_tokens and min_new_tokens, in place.

    transformers would count the prompt among a text's tokens.

    Args:
        given: arguments of ``generate()`` by name.
        text_length: the number of the text's tokens, including padding.

    Raises:
        ValueError: generation_config, which is the caller's own object, has such a length.
    """
    for of_all, of_new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        settings = given.get("generation_config")
        length = getattr(settings, of_all, None)
        if length and not getattr(settings, of_new, None):
            raise ValueError(
                f"generation_config.{of_all}: got {length}, takes None and {of_new} in its "
                "place with a prompt"
            )
        if given.get(of_all) is not None:
            length = given.pop(of_all) - text_length
            given.setdefault(of_new, length)
