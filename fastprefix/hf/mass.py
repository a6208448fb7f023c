"""How much of the attention falls on a prefix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastprefix.hf.evaluation import evaluating
from fastprefix.hf.patch.activation import activate
from fastprefix.hf.patch.patch import patch_of
from fastprefix.hf.patch.patching import patched
from fastprefix.hf.patch.probe import is_encoder_decoder, takes
from fastprefix.kv import PrefixKV


@torch.no_grad()
def attention_mass(model: PreTrainedModel, kv: PrefixKV, **inputs: Any) -> tuple[Tensor, ...]:
    """The share of the attention weights that falls on the prefix, by layer and query head.

    It is the mean over real tokens: tokens of the encoder in encoder layers, of the decoder in
    decoder layers. No weights are formed: a layer's output is this share if its values are 1 in the
    prefix and 0 in the text. For a prefix with gates the result is tanh(gate): the weight of the
    prefix beside the text, whose weight is 1.

    Args:
        model: see :func:`fastprefix.patch_model`; it is left as it was. It runs once, in evaluation
            mode.
        kv: the prefix.
        inputs: arguments of the model's forward. attention_mask (decoder_attention_mask) is 0 for
            padding.

    Returns:
        For each layer a float32 tensor [Hq]; zeros for a layer without a prefix.

    Raises:
        ValueError: kv does not fit the model.
    """
    with patched(model):
        masses: dict[int, Tensor] = {}
        active = replace(activate(model, kv), masses=masses)
        no_cache = {"use_cache": False} if takes(model, "use_cache") else {}
        with evaluating(model):
            model(**{**inputs, **no_cache, "fastprefix": active})
        groups = patch_of(model).groups
    means = []
    for slot, group in enumerate(groups):
        mass = masses[slot]  # [B, Hq, L]
        of_decoder = is_encoder_decoder(model) and group != "encoder"
        mask = inputs.get("decoder_attention_mask" if of_decoder else "attention_mask")
        real = mass.new_ones(mass.shape[0], mass.shape[2]) if mask is None else mask.to(mass)
        means.append(torch.einsum("bhl,bl->h", mass, real) / real.sum())
    return tuple(means)
