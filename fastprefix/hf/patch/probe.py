"""Runs a model once to learn which modules attend, in which order, and for which part of it.

Every call of an attention module in that run is a slot. A prefix has keys and values for each slot.
If layers share a module (ALBERT), each of its calls is a slot of its own.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprefix.hf.devices import device_of
from fastprefix.hf.evaluation import evaluating
from fastprefix.hf.layer import attention, masks
from fastprefix.hf.layer.active import Recorder
from fastprefix.hf.multimodal import language_model
from fastprefix.hf.versions import parameters
from fastprefix.kv import Group, LayerShape


class UnsupportedModelError(ValueError):
    """The model cannot take a prefix; the message says why."""


@dataclass(frozen=True)
class Slots:
    """What a model's attention looks like, in the order of the calls.

    Attributes:
        modules: the module of each call; layers may share one. In a model that sees or hears, only
            modules of its language model.
        shapes: shapes of the keys and values of each call.
        query_heads: Hq of each call.
        groups: which part of the model each call belongs to.
        sources: for each call, the first call with the same keys. This is the call itself if it has
            its own keys, and -1 if the first call had other values.
        shared: modules that run once for each of several layers. The order of their runs tells
            these layers apart.
        several: modules that attend several times in each run, and how often.
        own_use: whether the model asked for causal masks in full, for a use of its own.
        causal: modules whose masks are not what ``module.is_causal`` says: whether a call without a
            mask is causal, by the call's argument ``is_causal``.
    """

    modules: tuple[nn.Module, ...]
    shapes: tuple[LayerShape, ...]
    query_heads: tuple[int, ...]
    groups: tuple[Group, ...]
    sources: tuple[int, ...]
    shared: tuple[nn.Module, ...]
    several: dict[nn.Module, int]
    own_use: bool
    causal: dict[nn.Module, dict[bool | None, bool]]


def takes(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward has a parameter of this name."""
    return argument in parameters(module)


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether a model is one, by its forward: a T5 encoder has the config of the whole T5."""
    return takes(model, "decoder_input_ids")


@torch.no_grad()
def probe(model: PreTrainedModel, example: Mapping[str, Any] | None = None) -> Slots:
    """Runs a model, whose attention implementation is ours, on one short input.

    Args:
        model: it is left as it was, except for caches that its own forward keeps.
        example: keyword arguments to run it on; made from the config if None.

    Raises:
        UnsupportedModelError: keyword arguments do not reach its attention layers, or we cannot
            make an input for it.
    """
    kind = type(model).__name__
    inputs = dict(example) if example is not None else shortest_inputs(model)
    if takes(model, "use_cache"):
        inputs["use_cache"] = False

    def run(recorder: Recorder) -> Recorder:
        model(**inputs, fastprefix=recorder)
        return recorder

    missed: list[nn.Module] = []
    made: list[tuple[Tensor, bool]] = []
    own_use: list[bool] = []
    attention.modules_without_kwarg.append((threading.get_ident(), missed))
    masks.MADE.append(made)
    masks.OWN_USE.append(own_use)
    try:
        with evaluating(model):
            recorder = run(Recorder())
            shared, several = _shared(model, recorder.modules, run)
    except TypeError as error:
        raise UnsupportedModelError(
            f"{kind}: its forward does not pass keyword arguments down to the attention layers "
            f"({error})"
        ) from error
    except NotImplementedError as error:
        raise UnsupportedModelError(f"{kind}: {error}") from error
    finally:
        # by identity: lists of the same length may be equal
        noted = attention.modules_without_kwarg
        noted[:] = [other for other in noted if other[1] is not missed]
        masks.MADE[:] = [other for other in masks.MADE if other is not made]
        masks.OWN_USE[:] = [other for other in masks.OWN_USE if other is not own_use]
    inside = language_model(model)
    own = set((model if inside is None else inside).modules())
    keep = [call for call, module in enumerate(recorder.modules) if module in own]
    shared = tuple(module for module in shared if module in own)
    lost = sorted({type(module).__name__ for module in missed if module in own})
    if lost or not keep:
        which = f"{', '.join(lost)} of its" if lost else "none of its"
        verb = "did not receive" if lost else "received"
        raise UnsupportedModelError(
            f"{kind}: {which} attention layers {verb} the keyword arguments of the forward call, "
            "through which a prefix travels"
        )
    return Slots(
        tuple(recorder.modules[call] for call in keep),
        tuple(
            LayerShape(key.shape[1], key.shape[3], value.shape[3])
            for key, value in ((recorder.keys[call], recorder.values[call]) for call in keep)
        ),
        tuple(recorder.queries[call].shape[1] for call in keep),
        tuple(group for call, group in enumerate(_groups(model, recorder)) if call in set(keep)),
        _sources(recorder.of_modules(own)),
        shared,
        several,
        any(own_use),
        _causal(recorder),
    )


def _sources(recorder: Recorder) -> tuple[int, ...]:
    """See :class:`Slots`. All keys are still alive, so none shares its address by chance."""

    def same(a: Tensor, b: Tensor) -> bool:
        if a is b or a.device.type == "meta":
            return a is b
        return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()

    found = []
    for slot, key in enumerate(recorder.keys):
        first = next(n for n, other in enumerate(recorder.keys) if n == slot or same(key, other))
        values = recorder.values
        found.append(first if same(values[slot], values[first]) else -1)
    return tuple(found)


def _causal(recorder: Recorder) -> dict[nn.Module, dict[bool | None, bool]]:
    """See :class:`Slots`; without modules that got masks of both kinds."""
    found: dict[nn.Module, dict[bool | None, bool]] = {}
    both = set()
    calls = zip(recorder.modules, recorder.causal, recorder.is_causal_given, strict=True)
    for module, causal, given in calls:
        said = getattr(module, "is_causal", True) if given is None else given
        both |= {module} if found.get(module, {}).get(given, causal) != causal else set()
        if said != causal:
            found.setdefault(module, {})[given] = causal
    return {module: kinds for module, kinds in found.items() if module not in both}


def shortest_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """The shortest input that the model accepts, by its main input's name and its config."""
    config, main = model.config, model.main_input_name
    text = config.get_text_config()
    eos = getattr(text, "eos_token_id", None)
    last = eos if isinstance(eos, int) and 0 <= eos < text.vocab_size else 0
    if main == "input_ids" or language_model(model) is not None:
        main = "input_ids"
        # classifiers on a decoder look for the end of the text
        made = torch.tensor([[last if is_encoder_decoder(model) else 0]])
    elif main == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        made = torch.zeros(1, config.num_channels, height, width, dtype=model.dtype)
    elif main == "input_features" and hasattr(config, "max_source_positions"):
        frames = 2 * config.max_source_positions  # a spectrogram, halved by a convolution
        made = torch.zeros(1, config.num_mel_bins, frames, dtype=model.dtype)
    else:
        raise UnsupportedModelError(
            f"{type(model).__name__}: takes {main}, and nothing here knows how to make one; pass "
            "patch_model an example of the model's inputs"
        )
    inputs = {main: made.to(device_of(model))}
    if main == "input_ids" and device_of(model).type == "meta":
        # without a mask transformers reads values, and meta tensors have none
        inputs["attention_mask"] = torch.ones_like(inputs[main])
    if is_encoder_decoder(model):
        inputs["decoder_input_ids"] = torch.tensor([[last]], device=device_of(model))
    return inputs


def _groups(model: PreTrainedModel, recorder: Recorder) -> tuple[Group, ...]:
    if not is_encoder_decoder(model):
        return tuple("decoder" if causal else "encoder" for causal in recorder.causal)
    encoder = set(model.get_encoder().modules())
    if model in encoder:
        raise UnsupportedModelError(
            f"{type(model).__name__}: get_encoder() does not say which part is its encoder"
        )
    return tuple(
        "encoder" if module in encoder else "decoder" if causal else "cross"
        for module, causal in zip(recorder.modules, recorder.causal, strict=True)
    )


def _shared(
    model: PreTrainedModel, modules: list[nn.Module], run: Callable[[Recorder], Any]
) -> tuple[tuple[nn.Module, ...], dict[nn.Module, int]]:
    """How to tell layers apart if an attention module makes several calls.

    Returns:
        For each attention module that ran several times, the outermost module that ran as often.
        It is the outermost, because gradient checkpointing runs what is inside a layer again, out
        of order. And the modules that attend several times in each run, with how often.

    Raises:
        UnsupportedModelError: the calls cannot be told apart: the attention module is not called
            itself, does not receive the keyword arguments, or attends more often in some runs.
    """
    repeated = [module for module, number in Counter(modules).items() if number > 1]
    if not repeated:
        return (), {}
    calls: Counter[nn.Module] = Counter()
    recorder, own = Recorder(), threading.get_ident()
    before: dict[nn.Module, list[int]] = {module: [] for module in repeated}

    def count(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != own:
            return
        calls[module] += 1
        if module in before and kwargs.get(attention.NAME) is recorder:
            before[module].append(recorder.modules.count(module))

    handles = [
        module.register_forward_pre_hook(count, with_kwargs=True) for module in model.modules()
    ]
    try:
        run(recorder)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[nn.Module, None] = {}
    several: dict[nn.Module, int] = {}
    names = {module: name for name, module in model.named_modules()}
    for module in repeated:
        total, ran = recorder.modules.count(module), calls[module]
        each = total // max(ran, 1)
        if total != ran:
            if before[module] != list(range(0, total, max(each, 1))):
                raise UnsupportedModelError(
                    f"{type(model).__name__}: {type(module).__name__} attends {total} times in "
                    f"{ran} runs, and which of its calls is which cannot be told"
                )
            several[module] = each
        if ran == 1:
            continue
        parts = names[module].split(".")
        path = (model.get_submodule(".".join(parts[: end + 1])) for end in range(len(parts)))
        found[next(outer for outer in path if calls[outer] == calls[module])] = None
    return tuple(found), several


__all__ = [
    "Slots",
    "UnsupportedModelError",
    "is_encoder_decoder",
    "probe",
    "shortest_inputs",
    "takes",
]
