"""A text's keys and values, as the model's own attention layers receive them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastprefix.hf.attention import Recorder
from fastprefix.hf.patching import patched
from fastprefix.kv import PrefixKV


def prefill(model: PreTrainedModel, input_ids: Tensor | Sequence[int]) -> PrefixKV:
    """Runs a prompt through the model once; see :meth:`fastprefix.PrefixKV.prefill`."""
    ids = torch.as_tensor(input_ids, device=model.device)
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or ids.is_floating_point():
        raise ValueError(
            f"input_ids: got {ids.dtype} of shape {list(ids.shape)}, takes the token ids of one "
            "prompt, [P] or [1, P], P at least 1"
        )
    return _recorded(model, input_ids=ids)


def prefill_embeddings(model: PreTrainedModel, embeddings: Tensor) -> PrefixKV:
    """Keys and values of a prompt of embeddings, as :func:`prefill` gives those of a text.

    Args:
        model: a causal model that :func:`fastprefix.patch_model` accepts; left as it was.
        embeddings: [P, width].
    """
    return _recorded(model, inputs_embeds=embeddings[None].to(model.device, model.dtype))


@torch.no_grad()
def _recorded(model: PreTrainedModel, **inputs: Tensor) -> PrefixKV:
    """What the attention layers are handed for one sequence of input_ids or inputs_embeds."""
    (length,) = (tensor.shape[1] for tensor in inputs.values())
    recorder = Recorder()
    training = [module for module in model.modules() if module.training]
    # the logits of all but one token would be thrown away
    short = "logits_to_keep" in inspect.signature(model.forward).parameters
    with patched(model):
        model.eval()
        try:
            model(
                **inputs,
                use_cache=False,
                fastprefix=recorder,
                **({"logits_to_keep": 1} if short else {}),
            )
        finally:
            for module in training:
                module.training = True
    return PrefixKV(
        tuple(key[0].contiguous() for key in recorder.keys),
        tuple(value[0].contiguous() for value in recorder.values),
        position_offset=length,
        in_window=True,
    )
