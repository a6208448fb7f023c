"""Does a patched model without a prefix compute what it computed before?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fastprefix.hf.checking.judge import Judge
from fastprefix.hf.checking.known import SWITCH_OFF
from fastprefix.hf.checking.samples import PREFIX, TEXT, no_cache, samples
from fastprefix.hf.checking.trace import Trace, held_to, recorded, result_of
from fastprefix.hf.layer.active import Recorder
from fastprefix.hf.patch.probe import Slots

_LOGGER = logging.getLogger("fastprefix")


def compare_patch(
    model: PreTrainedModel,
    slots: Slots,
    example: Mapping[str, Any] | None,
    bare: Callable[[], Any],
    patched: Callable[[], Any],
) -> tuple[str, float | None]:
    """Whether a patched model computes what it did before.

    Args:
        model: a transformers model.
        slots: its attention layers.
        example: inputs to run it on; made from the config if None.
        bare: gives the model its own attention implementation back.
        patched: gives it ours.

    Returns:
        What is wrong, or "", and the largest relative error, or None if nothing was compared.
    """
    kind = type(model).__name__
    causal = "encoder" not in slots.groups
    choices = samples(model, PREFIX + TEXT, causal) if example is None else [dict(example)]
    runs: list[tuple[dict[str, Any], Trace, Tensor | None]] = []
    problem: Exception | None = None
    bare()
    before = model.config._attn_implementation
    try:
        for inputs in choices:
            if runs and "attention_mask" not in runs[-1][0]:
                break  # one run with a mask, one without: implementations have a path for each
            inputs |= no_cache(model)
            try:
                with recorded(slots.modules) as trace:
                    want = result_of(model(**inputs))
            except Exception as error:  # a model may raise anything on such an input
                problem = error
            else:
                runs.append((inputs, trace, want))
    finally:
        patched()
    if not runs:
        _LOGGER.warning("%s: patch is not checked: it runs on no sample (%s)", kind, problem)
        return "", None
    worst = 0.0
    for inputs, trace, want in runs:
        judge = Judge(model, trace, inputs)
        try:
            with held_to(trace, lambda _: 0, judge.compare):
                got = result_of(model(**inputs, fastprefix=Recorder()))
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            return f"{kind}: patched, it does not run as before ({error}). {SWITCH_OFF}", None
        judge.final(got, want)  # everything but attention is unchanged, bit for bit
        if judge.worst > judge.tolerance:
            return (
                f"{kind}: patched and without a prefix, {judge.where} computes something else than "
                f"before, with attn_implementation={before!r} (relative error {judge.worst:.1e}); "
                f"where another one is right, set that before. {SWITCH_OFF}"
            ), judge.worst
        worst = max(worst, judge.worst)
    return "", worst
