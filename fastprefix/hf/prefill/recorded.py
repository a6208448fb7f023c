"""The keys and values that the attention layers of a model receive for one text."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprefix.hf.evaluation import evaluating
from fastprefix.hf.expand.probe import cached_keys_values
from fastprefix.hf.layer.active import Recorder
from fastprefix.hf.layer.attention import SLOT
from fastprefix.hf.multimodal import language_model
from fastprefix.hf.patch.patch import patch_of
from fastprefix.hf.patch.patching import patched
from fastprefix.hf.patch.probe import is_encoder_decoder, takes
from fastprefix.hf.prefill.inputs import one_prompt
from fastprefix.hf.states.caches import prompt_states
from fastprefix.kv import PrefixKV


def text_keys_values(model: PreTrainedModel, input_ids: Tensor | Sequence[int]) -> PrefixKV:
    """The keys and values of a text in every attention layer, from which learning may start.

    An encoder-decoder reads the text twice, in its encoder and in its decoder.

    Args:
        model: see :func:`fastprefix.patch_model`; it is left as it was.
        input_ids: [P] or [1, P] token ids.

    Raises:
        ValueError: input_ids is empty or holds more than one sequence, or the model reads no text.
    """
    ids = one_prompt(model, input_ids)
    if is_encoder_decoder(model):
        return keys_values_of_run(model, input_ids=ids, decoder_input_ids=ids)
    return keys_values_of_run(model, input_ids=ids)


def embedding_keys_values(model: PreTrainedModel, input_ids: Tensor | Sequence[int]) -> PrefixKV:
    """The keys and values that every layer makes of a text's embeddings, as if it were the first.

    Each block gets the input of the first block: the embeddings, with positions added if the model
    adds them there. The block's own norm and projections then make keys and values.

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
            return keys_values_of_run(model, input_ids=ids)
        finally:
            for handle in handles:
                handle.remove()


def keys_values_of_run(
    model: PreTrainedModel,
    recorder: Recorder | None = None,
    states: bool = False,
    **inputs: Any,
) -> PrefixKV:
    """The keys and values of one sequence in every layer that prefixes have a share in.

    Args:
        model: it is patched for the run if necessary.
        recorder: records the run, if the caller wants to see more of it.
        states: whether to keep the states that other layers have after the run.
        inputs: arguments of the model's forward for one row.
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
        states=prompt_states(output) if states else None,
    )
    return sharding.gather(kv) if sharding else kv


def _own_calls(model: PreTrainedModel, recorder: Recorder) -> list[int]:
    """The numbers of the recorded calls whose layers have a share in prefixes, in order."""
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
