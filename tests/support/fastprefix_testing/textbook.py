"""A model that holds a prefix without fastprefix: its attention concatenates, in plain steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from fastprefix import PrefixKV
from fastprefix.hf.versions import set_attention
from fastprefix_testing.oracle import softmax_attention

_RAN: list[Any] = []  # modules, which get attributes of their own here


def _textbook_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in plain steps. A module's prefix is copied in front of the keys of each row."""
    _RAN.append(module)
    rows, heads, length = query.shape[:3]
    own: dict[str, Any] = {"scale": scaling, "softcap": softcap}
    bias, apart = query.new_zeros(rows, heads, length, key.shape[2]), 0.0
    for extra in (attention_mask, position_bias):
        bias = bias if extra is None else bias + extra
    if prefixes := getattr(module, "prefixes", None):
        # a module that several layers share has as many, which take turns
        front, front_value, what, numbers = prefixes[module.ran % len(prefixes)]
        module.ran += 1
        front, front_value = (x.expand(rows, -1, -1, -1) for x in (front, front_value))
        if what == "gate" and front.shape[2]:
            alone = softmax_attention(query, front, front_value, **own)[0]
            apart = alone.transpose(1, 2) * numbers.to(query.dtype).tanh()[:, None]
        else:
            key, value = torch.cat([front, key], 2), torch.cat([front_value, value], 2)
            bias = nn.functional.pad(bias, (front.shape[2], 0))
            if what == "bias" and front.shape[2]:
                added = numbers.to(query.dtype)[:, None, None].expand(-1, length, front.shape[2])
                bias = bias + nn.functional.pad(added, (0, key.shape[2] - front.shape[2]))
    out = softmax_attention(query, key, value, bias=bias, sinks=s_aux, **own)[0]
    return out.transpose(1, 2).contiguous() + apart, None


def textbook(model: PreTrainedModel) -> PreTrainedModel:
    """A bare model with this attention. It stays in float64, which transformers' own does not."""
    AttentionInterface.register("textbook", _textbook_attention)
    AttentionMaskInterface.register("textbook", eager_mask)
    set_attention(model, "textbook")
    return model


def concatenating(model: PreTrainedModel, kv: PrefixKV, inputs: dict[str, Any]) -> PreTrainedModel:
    """A bare model that holds a prefix, and gives its layers their parts in turn."""
    _RAN.clear()
    textbook(model)
    with torch.no_grad():
        model(**inputs)
    for module in _RAN:
        module.prefixes, module.ran = [], 0
    heads = kv.reweighting.heads if kv.reweighting else [None] * kv.num_layers
    what = kv.reweighting and kv.reweighting.kind
    for module, key, value, numbers in zip(_RAN, kv.keys, kv.values, heads, strict=True):
        module.prefixes.append((key, value, what, numbers))
    return model
