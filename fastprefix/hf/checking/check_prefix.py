"""Does every attention layer see its own share of a prefix, and only that, and its text?"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprefix.hf.checking.judge import Judge
from fastprefix.hf.checking.known import SWITCH_OFF, Known, ask
from fastprefix.hf.checking.samples import PREFIX, TEXT, no_cache, reads_text, tokens
from fastprefix.hf.checking.trace import Trace, held_to, recorded
from fastprefix.hf.layer.active import ActivePrefix, Recorder
from fastprefix.hf.patch.patch import Patch, patch_of
from fastprefix.hf.patch.probe import Slots, is_encoder_decoder, shortest_inputs, takes
from fastprefix.hf.states.keeping import says_stateful
from fastprefix.kv import PrefixKV

_LOGGER = logging.getLogger("fastprefix")


def check_prefix(model: PreTrainedModel) -> None:
    """Checks, once, that each layer of a patched model sees its own share of a prefix.

    Raises:
        ValueError: the model is not patched.
        UnsupportedModelError: some layer does not.
    """
    patch = patch_of(model)
    known: Known | None = patch.known
    if known is None or known.answers.get("prefix") == "" or torch.compiler.is_compiling():
        return
    ask(model, known, "prefix", lambda: compare_prefix(model, known.slots, patch, patch.example))


def compare_prefix(
    model: PreTrainedModel, slots: Slots, patch: Patch, example: Mapping[str, Any] | None
) -> tuple[str, float | None]:
    """Whether every layer of a patched model attends to its own share of a prefix.

    Args:
        model: patched.
        slots: its attention layers.
        patch: the model's.
        example: inputs to run it on; made from the config if None.

    Returns:
        What is wrong, or "", and the largest relative error, or None if nothing was compared.
    """
    kind = type(model).__name__
    is_text = example is None and reads_text(model)
    if is_text:
        inputs = tokens(model, 1, PREFIX + TEXT)
    else:
        inputs = shortest_inputs(model) if example is None else dict(example)
    inputs |= no_cache(model)
    recorder = Recorder()
    try:
        with recorded(slots.modules) as trace:
            model(**inputs, fastprefix=recorder)
    except Exception as problem:  # a model may raise anything on such an input
        _LOGGER.warning("%s: prefix is not checked: it runs on no sample (%s)", kind, problem)
        return "", None
    trial = _Trial(model, patch, slots, inputs, recorder.of_modules(slots.modules), trace)
    shortened = _shortened(model, slots, patch) if is_text else None
    expected = (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError)
    try:
        try:
            judge, unmoved = trial.run(shortened)
        except expected:
            if shortened is None or not is_encoder_decoder(model):
                raise
            judge, unmoved = trial.run(
                None
            )  # classifiers need the same text in encoder and decoder
    except expected as error:
        return f"{kind}: it does not run with a prefix ({error}). {SWITCH_OFF}", None
    if unmoved:
        return (
            f"{kind}: a prefix of its own does not change what {judge.name(unmoved[0])} computes. "
            f"{SWITCH_OFF}"
        ), None
    if judge.worst > judge.tolerance:
        return (
            f"{kind}: with a prefix of keys and values, {judge.where} computes something else than "
            f"with the same tokens in front of the text (relative error {judge.worst:.1e}). "
            f"{SWITCH_OFF}"
        ), judge.worst
    return "", judge.worst


@dataclass(frozen=True, eq=False)
class _Trial:
    """A run of a model on prefix and text in one sequence. Runs with a prefix must equal it.

    Attributes:
        model: patched.
        patch: the model's.
        slots: its attention layers.
        inputs: inputs of the run.
        recorder: what the attention functions received.
        trace: what the attention modules received and made.
    """

    model: PreTrainedModel
    patch: Patch
    slots: Slots
    inputs: dict[str, Any]
    recorder: Recorder
    trace: Trace

    def run(self, shortened: str | None) -> tuple[Judge, list[int]]:
        """Runs the model with a prefix.

        Args:
            shortened: the group of layers that get only the text behind the prefix; None if all
                layers get the whole text.

        Returns:
            What was compared, and the numbers of the calls that a prefix did not change.
        """
        groups, calls = self.slots.groups, _slots_of(self.slots, self.trace)
        stateful = says_stateful(self.model)
        held = _held(self.model, self.slots, self.recorder, shortened)
        judge, unmoved = Judge(self.model, self.trace, self.inputs), list[int]()

        def begin(number: int) -> int:
            return PREFIX if any(groups[slot] == shortened for slot in calls[number]) else 0

        def look(number: int, made: Tensor, want: Tensor) -> None:
            if not calls[number]:
                return
            same = judge.error(number, made, want) <= judge.tolerance
            if not all(held[slot] for slot in calls[number]):
                unmoved.extend([number] if same else [])
            elif same or not stateful:  # else it may start from a state that the prefix lacks
                judge.compare(number, made, want)

        kv = _shares(self.recorder, held, PREFIX if shortened is not None else 0)
        with held_to(self.trace, begin, look):
            self.model(
                **_behind(self.model, self.patch, self.inputs, shortened),
                fastprefix=ActivePrefix(kv, self.patch.backend),
            )
        return judge, unmoved


def _shortened(model: PreTrainedModel, slots: Slots, patch: Patch) -> str | None:
    """The group of layers whose text can be placed behind a prefix; None if there is none."""
    if not patch.placing.can_move:
        return None
    if is_encoder_decoder(model):
        return "decoder"
    groups = set(slots.groups)
    return groups.pop() if len(groups) == 1 else None


def _held(
    model: PreTrainedModel, slots: Slots, recorder: Recorder, shortened: str | None
) -> list[bool]:
    """For each slot, whether its layer sees prefix and text as in the whole sequence."""
    chunk = getattr(model.config.get_text_config(), "attention_chunk_size", None)
    if shortened is None or (chunk is not None and chunk < PREFIX + TEXT):
        return [False] * len(slots.groups)
    return [
        group == shortened
        and key.shape[2] == PREFIX + TEXT
        and (window is None or window >= PREFIX + TEXT)
        for group, key, window in zip(slots.groups, recorder.keys, recorder.windows, strict=True)
    ]


def _slots_of(slots: Slots, trace: Trace) -> list[list[int]]:
    """For each call of a trace, the slots of the attention in it."""
    own: dict[nn.Module, list[int]] = {}
    for slot, module in enumerate(slots.modules):
        own.setdefault(module, []).append(slot)
    times: dict[nn.Module, int] = {}
    for call in trace.calls:
        times[call.module] = times.get(call.module, 0) + 1
    found, seen = [], dict.fromkeys(times, 0)
    for call in trace.calls:
        each = max(1, len(own[call.module]) // times[call.module])
        start, seen[call.module] = seen[call.module], seen[call.module] + each
        found.append(own[call.module][start : start + each])
    return found


def _shares(recorder: Recorder, held: list[bool], offset: int) -> PrefixKV:
    """The start of the recorded keys and values; large random ones for slots not in held."""
    keys, values = [], []
    for key, value, same in zip(recorder.keys, recorder.values, held, strict=True):
        pair = [x[0, :, :PREFIX].contiguous() for x in (key, value)]
        if not same:
            loud = (x.float().std().clamp(min=1e-3) for x in (key, value))
            shapes = ((x.shape[1], PREFIX, x.shape[3]) for x in (key, value))
            pair = [
                (4 * scale * torch.randn(shape, device=key.device)).to(key.dtype)
                for scale, shape in zip(loud, shapes, strict=True)
            ]
        keys.append(pair[0])
        values.append(pair[1])
    return PrefixKV(tuple(keys), tuple(values), offset)


def _behind(
    model: PreTrainedModel, patch: Patch, inputs: Mapping[str, Any], shortened: str | None
) -> dict[str, Any]:
    """The inputs of a run with a prefix, where the shortened group gets the rest of the text."""
    if shortened is None:
        return dict(inputs)
    name = "decoder_input_ids" if is_encoder_decoder(model) else "input_ids"
    text = inputs[name][:, PREFIX:]
    told: dict[str, Any] = {name: text}
    if patch.placing.wants_position_ids and takes(model, "position_ids"):
        told["position_ids"] = torch.arange(TEXT, device=text.device)[None]
    return {**inputs, **told}
