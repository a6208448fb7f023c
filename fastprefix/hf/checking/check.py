"""A model is held to what it computed before it was patched, on a few tokens.

Three questions, each asked once per model, when its answer matters:

- patch: does the patched model without a prefix compute what the bare one does?
- prefix: does every attention layer see its own share of a prefix, and only that, and the text
  behind it? Each layer is handed what it was handed with prefix and text in one sequence, and must
  make the same of it (:mod:`fastprefix.hf.checking.trace`). Layers without such a sequence to
  hold them to (an encoder whose positions cannot be moved, cross-attention) must at least be moved
  by a prefix.
- prompt: does a text behind a prefilled prompt get the outputs of both in one sequence? Whatever a
  model keeps of a text besides keys and values shows here.

A model that fails is refused by what it did, not by its name.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fastprefix.hf.checking.judge import Judge
from fastprefix.hf.checking.samples import no_cache, reads_text, samples, tokens
from fastprefix.hf.checking.trace import Trace, held_to, recorded, result_of, undisturbed
from fastprefix.hf.devices import device_of, dtype_of, is_offloaded
from fastprefix.hf.layer.active import ActivePrefix, Recorder
from fastprefix.hf.patch.probe import (
    Slots,
    UnsupportedModelError,
    is_encoder_decoder,
    shortest_inputs,
    takes,
)
from fastprefix.hf.patch.state import State
from fastprefix.hf.states.keeping import says_stateful
from fastprefix.kv import PrefixKV

Question = Literal["patch", "prefix", "prompt"]

# Tokens of prefix and of text: together fewer than any real window or chunk.
PREFIX, TEXT = 3, 3
# A state in half precision is rounded at every token, so that its error grows with the text.
HALF, ROUNDED_STATE = 1e-2, 0.2
_OFF = "check=False switches this check off"

_LOGGER = logging.getLogger("fastprefix")


@dataclass(eq=False)
class Known:
    """What is known of a model, for as long as its modules, dtype and device are the same.

    Attributes:
        likeness: of these.
        slots: what the probe found.
        answers: to the questions that were asked: "" for right, else what is wrong.
        errors: the largest relative error that was seen; none where nothing could be compared.
    """

    likeness: Any
    slots: Slots
    answers: dict[Question, str] = field(default_factory=dict)
    errors: dict[Question, float] = field(default_factory=dict)


_KNOWN: weakref.WeakKeyDictionary[PreTrainedModel, Known] = weakref.WeakKeyDictionary()


def recall(model: PreTrainedModel) -> Known | None:
    """What is known of a model as it is now; None of a new or a changed one."""
    known = _KNOWN.get(model)
    return known if known is not None and known.likeness == _likeness(model) else None


def remember(model: PreTrainedModel, slots: Slots) -> Known:
    """Starts anew with what the probe found."""
    known = _KNOWN[model] = Known(_likeness(model), slots)
    return known


def ask(
    model: PreTrainedModel,
    known: Known,
    question: Question,
    compare: Callable[[], tuple[str, float | None]],
) -> None:
    """Raises UnsupportedModelError where the answer, found now or before, is not "".

    A model whose weights are not all here is not asked; a line in the log says so.

    Args:
        model: to run.
        known: where answers are kept.
        question: which.
        compare: finds what is wrong, or "", and the error, None where nothing was compared.
    """
    if question not in known.answers:
        why = _unable(model)
        if why:
            _LOGGER.warning("%s: %s is not checked: %s", type(model).__name__, question, why)
            known.answers[question] = ""
            return
        with undisturbed(model):
            known.answers[question], error = compare()
        if error is not None:
            known.errors[question] = error
    if known.answers[question]:
        raise UnsupportedModelError(known.answers[question])


def compare_patch(
    model: PreTrainedModel,
    slots: Slots,
    example: Mapping[str, Any] | None,
    bare: Callable[[], Any],
    patched: Callable[[], Any],
) -> tuple[str, float | None]:
    """Whether a patched model computes what it did before.

    Args:
        model: of transformers.
        slots: its attention layers.
        example: what to run it on; made from the config if None.
        bare: gives the model its own attention implementation back.
        patched: gives it ours.

    Returns:
        What is wrong, or "", and the largest relative error; None where there is none to tell.
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
                break  # with a mask and without: implementations treat them apart
            inputs |= no_cache(model)
            try:
                with recorded(slots.modules) as trace:
                    want = result_of(model(**inputs))
            except Exception as error:  # whatever a model of anybody's raises on such an input
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
            return f"{kind}: patched, it does not run as before ({error}). {_OFF}", None
        judge.final(got, want)  # what is not attention is the same to the last digit
        if judge.worst > judge.tolerance:
            return (
                f"{kind}: patched and without a prefix, {judge.where} computes something else than "
                f"before, with attn_implementation={before!r} (relative error {judge.worst:.1e}); "
                f"where another one is right, set that before. {_OFF}"
            ), judge.worst
        worst = max(worst, judge.worst)
    return "", worst


def compare_prefix(
    model: PreTrainedModel, slots: Slots, state: State, example: Mapping[str, Any] | None
) -> tuple[str, float | None]:
    """Whether every layer of a patched model attends to its own share of a prefix.

    Args:
        model: patched.
        slots: its attention layers.
        state: of the patch.
        example: what to run it on; made from the config if None.

    Returns:
        What is wrong, or "", and the largest relative error; None where there is none to tell.
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
    except Exception as problem:  # whatever a model of anybody's raises on such an input
        _LOGGER.warning("%s: prefix is not checked: it runs on no sample (%s)", kind, problem)
        return "", None
    recorder = recorder.only(slots.modules)
    stateful, calls = says_stateful(model), _slots_of(slots, trace)

    def run(shortened: str | None) -> tuple[Judge, list[int]]:
        """The model with a prefix; the text of one group of layers is what follows it."""
        held = _held(model, slots, recorder, shortened)
        judge, unmoved = Judge(model, trace, inputs), list[int]()

        def begin(number: int) -> int:
            return PREFIX if any(slots.groups[slot] == shortened for slot in calls[number]) else 0

        def look(number: int, made: Tensor, want: Tensor) -> None:
            if not calls[number]:
                return
            same = judge.error(number, made, want) <= judge.tolerance
            if not all(held[slot] for slot in calls[number]):
                unmoved.extend([number] if same else [])
            elif same or not stateful:  # else attention may start from a state, a prompt's own
                judge.compare(number, made, want)

        kv = _shares(recorder, held, PREFIX if shortened is not None else 0)
        with held_to(trace, begin, look):
            model(
                **_behind(model, state, inputs, shortened),
                fastprefix=ActivePrefix(kv, state.backend),
            )
        return judge, unmoved

    shortened = _shortened(model, slots, state) if is_text else None
    expected = (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError)
    try:
        try:
            judge, unmoved = run(shortened)
        except expected:
            if shortened is None or not is_encoder_decoder(model):
                raise
            judge, unmoved = run(None)  # classifiers want one text in encoder and decoder
    except expected as error:
        return f"{kind}: it does not run with a prefix ({error}). {_OFF}", None
    if unmoved:
        return (
            f"{kind}: a prefix of its own does not change what {judge.name(unmoved[0])} computes. "
            f"{_OFF}"
        ), None
    if judge.worst > judge.tolerance:
        return (
            f"{kind}: with a prefix of keys and values, {judge.where} computes something else than "
            f"with the same tokens in front of the text (relative error {judge.worst:.1e}). {_OFF}"
        ), judge.worst
    return "", judge.worst


def compare_prompt(
    model: PreTrainedModel,
    slots: Slots,
    prefilled: Callable[[Tensor], PrefixKV],
    behind: Callable[..., Any],
) -> tuple[str, float | None]:
    """Whether a text behind a prefilled prompt gets the outputs of both in one sequence.

    All blocks of the stack are held to that sequence, those without attention among them.

    Args:
        model: patched, a decoder.
        slots: its attention layers.
        prefilled: makes a prefix of token ids [1, P].
        behind: runs the model on keyword arguments with a prefix, or with None.

    Returns:
        What is wrong, or "", and the largest relative error; None where there is none to tell.
    """
    ids: Tensor = tokens(model, 1, PREFIX + TEXT)["input_ids"]
    kv = prefilled(ids[:, :PREFIX])
    with recorded(_blocks(model, slots)) as trace:
        want = result_of(behind(None, input_ids=ids))
    judge = Judge(model, trace, {})
    with held_to(trace, lambda _: PREFIX, judge.compare):
        got = result_of(behind(kv, input_ids=ids[:, PREFIX:]))
    judge.final(got, _last(want, TEXT))
    rounded = says_stateful(model) and judge.tolerance >= HALF  # token by token, or all at once
    if judge.worst > (ROUNDED_STATE if rounded else judge.tolerance):
        return (
            f"{type(model).__name__}: a prompt's keys and values are not all that it keeps of a "
            f"prompt: behind them {judge.where} computes something else than with prompt and text "
            f"in one sequence (relative error {judge.worst:.1e}); put the prompt into input_ids. "
            f"{_OFF}"
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


def _unable(model: PreTrainedModel) -> str:
    """Why a model cannot be run alone and compared; "" where it can."""
    parameters = list(model.parameters())
    if any(x.is_meta for x in parameters) and not is_offloaded(model):
        return "some of its weights are on the meta device"
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return "its weights are sharded"
    if (getattr(model, "tp_size", None) or 1) > 1:
        return "it is tensor-parallel"
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return "its weights are DeepSpeed's"
    return ""


def _likeness(model: PreTrainedModel) -> Any:
    return tuple(map(id, model.modules())), dtype_of(model), device_of(model)


def ask_prefix(model: PreTrainedModel, state: State) -> None:
    """Asks, once, whether a patched model's layers see their own shares of a prefix.

    Raises:
        UnsupportedModelError: one does not.
    """
    known = state.known
    if known is None or known.answers.get("prefix") == "" or torch.compiler.is_compiling():
        return
    ask(model, known, "prefix", lambda: compare_prefix(model, known.slots, state, state.example))


def _shortened(model: PreTrainedModel, slots: Slots, state: State) -> str | None:
    """The group of layers whose text can be placed behind a prefix; None where none can."""
    if state.placing == "fixed":
        return None
    if is_encoder_decoder(model):
        return "decoder"
    groups = set(slots.groups)
    return groups.pop() if len(groups) == 1 else None


def _held(
    model: PreTrainedModel, slots: Slots, recorder: Recorder, shortened: str | None
) -> list[bool]:
    """For each slot whether a prefix is, for its layer, the start of the same sequence."""
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
    """For each call of a trace the slots of the attention in it."""
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
    """The start of the recorded keys and values; loud random ones where nothing is held to them."""
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
    model: PreTrainedModel, state: State, inputs: Mapping[str, Any], shortened: str | None
) -> dict[str, Any]:
    """The inputs with the text alone, where it is behind the prefix."""
    if shortened is None:
        return dict(inputs)
    name = "decoder_input_ids" if is_encoder_decoder(model) else "input_ids"
    text = inputs[name][:, PREFIX:]
    told: dict[str, Any] = {name: text}
    if state.placing == "given" and takes(model, "position_ids"):
        told["position_ids"] = torch.arange(TEXT, device=text.device)[None]
    return {**inputs, **told}


def _last(output: Tensor | None, length: int) -> Tensor | None:
    """The last tokens of an output that has one for each; else all of it."""
    if output is None or output.dim() < 3 or output.shape[1] != PREFIX + TEXT:
        return output
    return output[:, -length:]
