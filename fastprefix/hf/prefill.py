"""A text's keys and values, as the model's own attention layers receive them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastprefix.hf.attention import Recorder
from fastprefix.hf.patching import patched, sharding_of
from fastprefix.kv import PrefixKV


@torch.no_grad()
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
    recorder = Recorder()
    training = [module for module in model.modules() if module.training]
    # the logits of all but one token would be thrown away
    short = "logits_to_keep" in inspect.signature(model.forward).parameters
    with patched(model):
        sharding = sharding_of(model)
        ids = sharding.agreed(ids) if sharding else ids
        model.eval()
        try:
            model(
                input_ids=ids,
                use_cache=False,
                fastprefix=recorder,
                **({"logits_to_keep": 1} if short else {}),
            )
        finally:
            for module in training:
                module.training = True
    kv = PrefixKV(
        tuple(key[0].contiguous() for key in recorder.keys),
        tuple(value[0].contiguous() for value in recorder.values),
        position_offset=ids.shape[1],
        in_window=True,
    )
    return sharding.gather(kv) if sharding else kv
