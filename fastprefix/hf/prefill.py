"""A text's keys and values, as the model's own attention layers receive them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprefix.hf.active import Recorder
from fastprefix.hf.attention import SLOT
from fastprefix.hf.check import ask, ask_prefix, compare_prompt
from fastprefix.hf.patching import activate, layer_groups, patched, sharding_of, state_of
from fastprefix.hf.probe import is_encoder_decoder, takes
from fastprefix.kv import PrefixKV


def prefill(
    model: PreTrainedModel, input_ids: Tensor | Sequence[int], *, check: bool = True
) -> PrefixKV:
    """Runs a prompt through the model once; see :meth:`fastprefix.PrefixKV.prefill`."""
    return _as_prompt(model, check, input_ids=_one_text(model, input_ids))


def prefill_embeddings(model: PreTrainedModel, embeddings: Tensor) -> PrefixKV:
    """Keys and values of a prompt of embeddings, as :func:`prefill` gives those of a text.

    Args:
        model: a decoder-only model that :func:`fastprefix.patch_model` accepts; left as it was.
        embeddings: [P, width].

    Raises:
        ValueError: not a decoder-only model.
    """
    return _as_prompt(model, True, inputs_embeds=embeddings[None].to(model.device, model.dtype))


def text_keys_values(model: PreTrainedModel, input_ids: Tensor | Sequence[int]) -> PrefixKV:
    """What every attention layer makes of a text: where a learned prefix may start from.

    An encoder-decoder reads the text twice, in its encoder and in its decoder.

    Args:
        model: see :func:`fastprefix.patch_model`; it is left as it was.
        input_ids: [P] or [1, P] token ids.

    Raises:
        ValueError: input_ids is empty or holds more than one sequence, or the model reads no text.
    """
    ids = _one_text(model, input_ids)
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
    ids, first = _one_text(model, input_ids), list[Tensor]()
    if is_encoder_decoder(model):
        raise ValueError(
            f"init: got 'embeddings' for {type(model).__name__}, takes 'text': the cross-attention "
            "of an encoder-decoder has no embeddings to start from"
        )

    def from_the_start(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
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
        names = {name for name, module in model.named_modules() if hasattr(module, SLOT)}
        blocks = [model.get_submodule(name.rpartition(".")[0]) for name in names]
        handles = [x.register_forward_pre_hook(from_the_start, with_kwargs=True) for x in blocks]
        try:
            return _recorded(model, input_ids=ids)
        finally:
            for handle in handles:
                handle.remove()


def _one_text(model: PreTrainedModel, input_ids: Tensor | Sequence[int]) -> Tensor:
    """Token ids [1, P] of one text."""
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"model: got {type(model).__name__}, which reads {model.main_input_name}, takes one "
            "that reads text"
        )
    ids = torch.as_tensor(input_ids, device=model.device)
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or ids.is_floating_point():
        raise ValueError(
            f"input_ids: got {ids.dtype} of shape {list(ids.shape)}, takes the token ids of one "
            "prompt, [P] or [1, P], P at least 1"
        )
    return ids


def _as_prompt(model: PreTrainedModel, check: bool, **inputs: Tensor) -> PrefixKV:
    with patched(model, check=check):
        if set(layer_groups(model)) != {"decoder"}:
            raise ValueError(
                f"model: got {type(model).__name__}, takes a decoder-only model; an encoder's "
                "prompt sees the text, so its keys are not the same for every text"
            )
        kv = _prompt(model, **inputs)
        if check:
            _check_prompt(model, kv)
        return kv


def _prompt(model: PreTrainedModel, **inputs: Tensor) -> PrefixKV:
    kv = _recorded(model, **inputs)
    return PrefixKV(kv.keys, kv.values, position_offset=kv.num_virtual_tokens, in_window=True)


def _check_prompt(model: PreTrainedModel, kv: PrefixKV) -> None:
    """Compares, once per model, a text behind a prompt's prefix with both in one sequence."""
    try:
        activate(model, kv, check=False)
    except NotImplementedError:
        return  # refused by name wherever it is used

    def behind(kv: PrefixKV | None, **inputs: Tensor) -> Any:
        return model(**inputs, fastprefix=activate(model, kv, check=False))

    known = state_of(model).known
    if known is not None:
        ask_prefix(model, state_of(model))
        ask(
            model,
            known,
            "prompt",
            lambda: compare_prompt(
                model, known.slots, lambda ids: _prompt(model, input_ids=ids), behind
            ),
        )


@torch.no_grad()
def _recorded(model: PreTrainedModel, **inputs: Tensor) -> PrefixKV:
    """What the attention layers are handed for one sequence of input_ids or inputs_embeds."""
    recorder = Recorder()
    training = [module for module in model.modules() if module.training]
    options: dict[str, Any] = {"use_cache": False} if takes(model, "use_cache") else {}
    if takes(model, "logits_to_keep"):
        options["logits_to_keep"] = 1  # those of all other tokens would be thrown away
    with patched(model):
        sharding = sharding_of(model)
        if sharding is not None:
            inputs = {name: sharding.agreed(x) for name, x in inputs.items()}
        model.eval()
        try:
            model(**inputs, fastprefix=recorder, **options)
        finally:
            for module in training:
                module.training = True
    kv = PrefixKV(
        tuple(key[0].contiguous() for key in recorder.keys),
        tuple(value[0].contiguous() for value in recorder.values),
        position_offset=0,
    )
    return sharding.gather(kv) if sharding else kv
