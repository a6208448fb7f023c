"""Does a text behind a prefilled prompt get the outputs of prompt and text in one sequence?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprefix.hf.checking.judge import Judge
from fastprefix.hf.checking.known import SWITCH_OFF
from fastprefix.hf.checking.samples import PREFIX, TEXT, tokens
from fastprefix.hf.checking.trace import held_to, recorded, result_of
from fastprefix.hf.patch.probe import Slots
from fastprefix.hf.states.keeping import says_stateful
from fastprefix.kv import PrefixKV

# A state in half precision is rounded at every token, so its error grows with the text.
_HALF, _ROUNDED_STATE = 1e-2, 0.2


def compare_prompt(
    model: PreTrainedModel,
    slots: Slots,
    prefilled: Callable[[Tensor], PrefixKV],
    behind: Callable[..., Any],
) -> tuple[str, float | None]:
    """Whether a text behind a prefilled prompt gets the outputs of both in one sequence.

    All blocks of the stack are compared with that sequence, those without attention included.

    Args:
        model: patched, a decoder.
        slots: its attention layers.
        prefilled: makes a prefix of token ids [1, P].
        behind: runs the model on keyword arguments with a prefix, or with None.

    Returns:
        What is wrong, or "", and the largest relative error, or None if nothing was compared.
    """
    ids: Tensor = tokens(model, 1, PREFIX + TEXT)["input_ids"]
    kv = prefilled(ids[:, :PREFIX])
    with recorded(_blocks(model, slots)) as trace:
        want = result_of(behind(None, input_ids=ids))
    judge = Judge(model, trace, {})
    with held_to(trace, lambda _: PREFIX, judge.compare):
        got = result_of(behind(kv, input_ids=ids[:, PREFIX:]))
    judge.final(got, _last(want, TEXT))
    rounded = says_stateful(model) and judge.tolerance >= _HALF  # a state made token by token
    if judge.worst > (_ROUNDED_STATE if rounded else judge.tolerance):
        return (
            f"{type(model).__name__}: a prompt's keys and values are not all that it keeps of a "
            f"prompt: behind them {judge.where} computes something else than with prompt and text "
            f"in one sequence (relative error {judge.worst:.1e}); put the prompt into input_ids. "
            f"{SWITCH_OFF}"
        ), judge.worst
    return "", judge.worst


def _blocks(model: PreTrainedModel, slots: Slots) -> list[nn.Module]:
    """The blocks of the stacks that the attention layers are in, in any order."""
    names = {module: name for name, module in model.named_modules()}
    stacks = []
    for module in dict.fromkeys(slots.modules):
        parts = names[module].split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        if numbers:
            stacks.append(".".join(parts[: numbers[0]]))
    return [
        block for stack in dict.fromkeys(stacks) for block in model.get_submodule(stack).children()
    ]


def _last(output: Tensor | None, length: int) -> Tensor | None:
    """The part of an output for the last tokens; all of it if it has no part for each token."""
    if output is None or output.dim() < 3 or output.shape[1] != PREFIX + TEXT:
        return output
    return output[:, -length:]
