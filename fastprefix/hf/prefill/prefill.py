"""A text's keys and values, as the model's own attention layers receive them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprefix.arguments import check_type
from fastprefix.hf.checking.check_prefix import check_prefix
from fastprefix.hf.checking.check_prompt import compare_prompt
from fastprefix.hf.checking.known import ask
from fastprefix.hf.devices import device_of
from fastprefix.hf.evaluation import evaluating
from fastprefix.hf.expand.probe import cached_keys_values
from fastprefix.hf.layer.active import Recorder
from fastprefix.hf.layer.attention import SLOT
from fastprefix.hf.multimodal import language_model, next_position
from fastprefix.hf.patch.activation import activate
from fastprefix.hf.patch.patch import patch_of
from fastprefix.hf.patch.patching import Fallback, patched
from fastprefix.hf.patch.probe import is_encoder_decoder, takes
from fastprefix.hf.prefill.inputs import one_prompt, prompt_inputs
from fastprefix.hf.states.caches import take
from fastprefix.hf.states.keeping import keeping_of, refuse
from fastprefix.kv import PrefixKV


def prefill(
    model: PreTrainedModel,
    input_ids: Tensor | Sequence[int] | None = None,
    *,
    check: bool = True,
    fallback: Fallback | None = None,
    **inputs: Any,
) -> PrefixKV:
    """Runs a prompt through the model once; see :meth:`fastprefix.PrefixKV.prefill`."""
    check_type("model", model, PreTrainedModel, "a transformers PreTrainedModel")
    made = prompt_inputs(model, input_ids, inputs)
    with patched(model, fallback, check=check):
        return _as_prompt(model, check, **made)


def prefill_embeddings(model: PreTrainedModel, embeddings: Tensor) -> PrefixKV:
    """Keys and values of a prompt of embeddings, as :func:`prefill` gives those of a text.

    Args:
        model: a decoder-only model that :func:`fastprefix.patch_model` accepts; left as it was.
        embeddings: [P, width].

    Raises:
        ValueError: not a decoder-only model.
    """
    return _as_prompt(model, True, inputs_embeds=embeddings[None].to(device_of(model), model.dtype))


def text_keys_values(model: PreTrainedModel, input_ids: Tensor | Sequence[int]) -> PrefixKV:
    """What every attention layer makes of a text: where a learned prefix may start from.

    An encoder-decoder reads the text twice, in its encoder and in its decoder.

    Args:
        model: see :func:`fastprefix.patch_model`; it is left as it was.
        input_ids: [P] or [1, P] token ids.

    Raises:
        ValueError: input_ids is empty or holds more than one sequence, or the model reads no text.
    """
    ids = one_prompt(model, input_ids)
    if is_encoder_decoder(model):
        return _recorded(model, input_ids=ids, decoder_input_ids=ids)
    return _recorded(model, input_ids=ids)


def embedding_keys_values(model: PreTrainedModel, input_ids: Tensor | Sequence[int]) -> PrefixKV:
    """What every attention layer makes of a text's embeddings, as though it were the first layer.

    The block around each attention module gets what the first block gets: the embeddings, with
    positions where these are added to them. Its own norm and projections then make the keys.

    Args:
        model: see :func:`text_keys_values`; one stack.
        input_ids: [P] or [1, P] token ids.

    Raises:
        ValueError: see :func:`text_keys_values`; or an encoder-decoder, whose cross-attention sees
            no embeddings, or blocks whose inputs have different shapes.
    """
    ids, first, thread = one_prompt(model, input_ids), list[Tensor](), threading.get_ident()
    if is_encoder_decoder(model):
        raise ValueError(
            f"init: got 'embeddings' for {type(model).__name__}, takes 'text': the cross-attention "
            "of an encoder-decoder has no embeddings to start from"
        )

    def from_the_start(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != thread:
            return args, kwargs
        given = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(given, Tensor) or (first and given.shape != first[0].shape):
            raise ValueError(
                f"init: got 'embeddings' for {type(model).__name__}, takes 'text': the input of a "
                f"{type(module).__name__} is not like the embeddings"
            )
        first.append(given)
        if args:
            return (first[0], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": first[0]}

    with patched(model):
        if patch_of(model).expanded is not None:
            raise ValueError(
                f"init: got 'embeddings' for {type(model).__name__} with fallback='expand', takes "
                "'text': its layers cannot be told apart from outside"
            )
        names = {name for name, module in model.named_modules() if hasattr(module, SLOT)}
        blocks = [model.get_submodule(name.rpartition(".")[0]) for name in names]
        handles = [x.register_forward_pre_hook(from_the_start, with_kwargs=True) for x in blocks]
        try:
            return _recorded(model, input_ids=ids)
        finally:
            for handle in handles:
                handle.remove()


def _as_prompt(model: PreTrainedModel, check: bool, **inputs: Any) -> PrefixKV:
    with patched(model, check=check):
        if set(patch_of(model).groups) != {"decoder"} or _sees_both_sides(model):
            raise ValueError(
                f"model: got {type(model).__name__}, takes a decoder-only model; an encoder's "
                "prompt sees the text, so its keys are not the same for every text"
            )
        if patch_of(model).expanded is not None:
            # it was compared with one sequence when it was patched
            kv = _recorded(model, **inputs)
            return replace(kv, position_offset=kv.num_virtual_tokens, in_window=True)
        refuse(model, keeping_of(model))
        kv = _prompt(model, **inputs)
        if check:
            _check_prompt(model, kv)
        return kv


def _sees_both_sides(model: PreTrainedModel) -> bool:
    """Whether types of tokens decide who sees the text behind (PaliGemma): its layers say so."""
    layers = (module for module in model.modules() if hasattr(module, SLOT))
    return takes(model, "token_type_ids") and not all(
        getattr(layer, "is_causal", True) for layer in layers
    )


def _prompt(model: PreTrainedModel, **inputs: Tensor) -> PrefixKV:
    recorder = Recorder()
    kv = _recorded(model, recorder, states=keeping_of(model).stateful, **inputs)
    offset = next_position(kv.num_virtual_tokens, recorder.positions)
    return replace(kv, position_offset=offset, in_window=True)


def _check_prompt(model: PreTrainedModel, kv: PrefixKV) -> None:
    """Compares, once per model, a text behind a prompt's prefix with both in one sequence."""
    try:
        activate(model, kv, check=False)
    except NotImplementedError:
        return  # refused by name wherever it is used

    def behind(kv: PrefixKV | None, **inputs: Tensor) -> Any:
        return model(**inputs, fastprefix=activate(model, kv, check=False))

    known = patch_of(model).known
    if known is not None:
        check_prefix(model)
        ask(
            model,
            known,
            "prompt",
            lambda: compare_prompt(
                model, known.slots, lambda ids: _prompt(model, input_ids=ids), behind
            ),
        )


@torch.no_grad()
def _recorded(
    model: PreTrainedModel,
    recorder: Recorder | None = None,
    states: bool = False,
    **inputs: Any,
) -> PrefixKV:
    """What the attention layers are handed for one sequence of input_ids or inputs_embeds.

    And, if asked for, the states that other layers have afterwards.
    """
    recorder = Recorder() if recorder is None else recorder
    options: dict[str, Any] = {"use_cache": states} if states or takes(model, "use_cache") else {}
    if takes(model, "logits_to_keep"):
        options["logits_to_keep"] = 1  # those of all other tokens would be thrown away
    with patched(model):
        if patch_of(model).expanded is not None:
            return cached_keys_values(model, inputs)
        sharding = patch_of(model).sharding
        if sharding is not None:
            inputs = {
                name: sharding.agreed(x) if isinstance(x, Tensor) else x
                for name, x in inputs.items()
            }
        with evaluating(model):
            output = model(**inputs, fastprefix=recorder, **options)
        calls = _own_calls(model, recorder)
    kv = PrefixKV(
        tuple(recorder.keys[call][0].contiguous() for call in calls),
        tuple(recorder.values[call][0].contiguous() for call in calls),
        position_offset=0,
        states=take(output) if states else None,
    )
    return sharding.gather(kv) if sharding else kv


def _own_calls(model: PreTrainedModel, recorder: Recorder) -> list[int]:
    """The recorded calls of the layers that have a share in prefixes, in their order."""
    inside = language_model(model)
    own = set((model if inside is None else inside).modules())
    calls = [call for call, module in enumerate(recorder.modules) if module in own]
    new = sorted(
        {
            type(recorder.modules[x]).__name__
            for x in calls
            if not hasattr(recorder.modules[x], SLOT)
        }
    )
    if new:
        raise NotImplementedError(
            f"{', '.join(new)}: did not run when the model was patched, so that there is no place "
            "for its keys and values; patch the model as you run it"
        )
    return calls
