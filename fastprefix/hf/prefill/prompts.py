"""Runs a prompt once and makes a prefix of its keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fastprefix.arguments import check_type
from fastprefix.hf.checking.check_prefix import check_prefix
from fastprefix.hf.checking.check_prompt import compare_prompt
from fastprefix.hf.checking.known import ask
from fastprefix.hf.devices import device_of
from fastprefix.hf.layer.active import Recorder
from fastprefix.hf.layer.attention import SLOT
from fastprefix.hf.multimodal import next_position
from fastprefix.hf.patch.activation import activate
from fastprefix.hf.patch.patch import patch_of
from fastprefix.hf.patch.patching import Fallback, patched
from fastprefix.hf.patch.probe import takes
from fastprefix.hf.prefill.inputs import prompt_inputs
from fastprefix.hf.prefill.recorded import keys_values_of_run
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
    """Like :func:`prefill`, for a prompt that is given as embeddings.

    Args:
        model: a decoder-only model that :func:`fastprefix.patch_model` accepts; left as it was.
        embeddings: [P, width].

    Raises:
        ValueError: not a decoder-only model.
    """
    return _as_prompt(model, True, inputs_embeds=embeddings[None].to(device_of(model), model.dtype))


def _as_prompt(model: PreTrainedModel, check: bool, **inputs: Any) -> PrefixKV:
    with patched(model, check=check):
        if set(patch_of(model).groups) != {"decoder"} or _sees_both_sides(model):
            raise ValueError(
                f"model: got {type(model).__name__}, takes a decoder-only model; an encoder's "
                "prompt sees the text, so its keys are not the same for every text"
            )
        if patch_of(model).expanded is not None:
            # patching has compared it with one sequence already
            kv = keys_values_of_run(model, **inputs)
            return replace(kv, position_offset=kv.num_virtual_tokens, in_window=True)
        refuse(model, keeping_of(model))
        kv = _prompt(model, **inputs)
        if check:
            _check_prompt(model, kv)
        return kv


def _sees_both_sides(model: PreTrainedModel) -> bool:
    """Whether token types let tokens see those behind them (PaliGemma)."""
    layers = (module for module in model.modules() if hasattr(module, SLOT))
    return takes(model, "token_type_ids") and not all(
        getattr(layer, "is_causal", True) for layer in layers
    )


def _prompt(model: PreTrainedModel, **inputs: Tensor) -> PrefixKV:
    recorder = Recorder()
    kv = keys_values_of_run(model, recorder, states=keeping_of(model).stateful, **inputs)
    offset = next_position(kv.num_virtual_tokens, recorder.positions)
    return replace(kv, position_offset=offset, in_window=True)


def _check_prompt(model: PreTrainedModel, kv: PrefixKV) -> None:
    """Compares, once per model, a text behind a prompt's prefix with both in one sequence."""
    try:
        activate(model, kv, check=False)
    except NotImplementedError:
        return  # every use of the prompt refuses it, with its own message

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
