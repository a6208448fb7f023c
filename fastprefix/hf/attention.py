"""The attention function that transformers calls in every layer of a patched model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from fastprefix.attention import prefix_attention
from fastprefix.hf.masks import prefix_attention_mask
from fastprefix.kv import PrefixKV

NAME = "fastprefix"
SLOT = "_fastprefix_slot"


@dataclass(frozen=True, eq=False)
class ActivePrefix:
    """What travels with a forward call, as its keyword argument ``fastprefix``.

    Attributes:
        kv: the prefix, or None for plain attention.
        backend: of :func:`fastprefix.prefix_attention`.
        positioned: whether the call's position_ids are already moved behind the prefix.
    """

    kv: PrefixKV | None
    backend: str = "auto"
    positioned: bool = False


@dataclass(eq=False)
class Recorder:
    """Travels like :class:`ActivePrefix`, and keeps what each attention layer was handed.

    Attributes:
        modules: the attention modules in the order of their calls.
        keys: [B, Hkv, L, D] of each call.
        values: [B, Hkv, L, Dv] of each call.
    """

    modules: list[nn.Module] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def record(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Keeps one call."""
        self.modules.append(module)
        self.keys.append(key)
        self.values.append(value)


def prefix_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    fastprefix: ActivePrefix | Recorder | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers' AttentionInterface.

    Args:
        module: the attention module; its slot says which layer of the prefix is its own.
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D], from the cache where there is one: the text alone.
        value: [B, Hkv, Lk, Dv].
        attention_mask: as :mod:`fastprefix.hf.masks` makes it, or a custom mask of 4 dimensions.
        dropout: attention dropout.
        scaling: factor on the scores.
        is_causal: overrides the module's own.
        sliding_window: how many keys a query sees, itself included.
        softcap: of the scores.
        fastprefix: what the hook of a patched model injected.
        kwargs: the rest of what models hand down.

    Returns:
        [B, Lq, Hq, Dv], and None for the weights, which are never formed.

    Raises:
        ValueError: the module has no slot for the prefix.
        NotImplementedError: the model needs a feature that the operator does not have yet.
    """
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError(
            f"{type(module).__name__} adds a position bias, which is not supported yet"
        )
    if dropout:
        raise NotImplementedError(
            f"{type(module).__name__} applies attention dropout ({dropout}) in training, which is "
            "not supported yet: load the model with that probability at 0 (attention_dropout=0.0 "
            "or attn_pdrop=0.0, as its config calls it)"
        )
    backend, prefix_key, prefix_value = "auto", None, None
    if isinstance(fastprefix, Recorder):
        fastprefix.record(module, key, value)
    elif fastprefix is not None:
        backend = fastprefix.backend
        if fastprefix.kv is not None:
            slot = getattr(module, SLOT, None)
            if slot is None:
                raise ValueError(
                    f"{type(module).__name__}: this layer did not run when the model was patched, "
                    "so it has no share in the prefix; patch the model as you run it"
                )
            prefix_key, prefix_value = fastprefix.kv.layer(slot)
            whole = prefix_key.shape[1] + key.shape[2]
            if fastprefix.kv.in_window and sliding_window is not None and whole > sliding_window:
                raise NotImplementedError(
                    f"{type(module).__name__} has a sliding_window of {sliding_window}, and a "
                    f"prompt of {prefix_key.shape[1]} tokens with {key.shape[2]} tokens of text "
                    "does not fit: prompts that slide out of it are not supported yet"
                )

    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if prefix_key is not None and prefix_value is not None:
        prefix_key = prefix_key.to(query.device, query.dtype)
        prefix_value = prefix_value.to(query.device, query.dtype)

    key_padding_mask = attn_mask = None
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if attention_mask is not None and attention_mask.dim() == 2:
        key_padding_mask = attention_mask
    elif attention_mask is not None:
        causal = False
        B, Lk = key.shape[0], key.shape[2]
        if attention_mask.dtype is torch.bool and attention_mask.shape[1:] == (1, 1, Lk):
            key_padding_mask = attention_mask[:, 0, 0].expand(B, Lk)
        else:
            attn_mask = attention_mask
    window = sliding_window
    if window is not None and (attn_mask is not None or key.shape[2] <= window):
        window = None  # the mask has it, or every key lies within it

    out = prefix_attention(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        is_causal=causal,
        scale=scaling,
        sliding_window=window,
        softcap=softcap,
        sinks=kwargs.get("s_aux"),
        backend=backend,
    )
    return out.transpose(1, 2), None


def register() -> None:
    """Makes "fastprefix" an ``attn_implementation`` of transformers. Idempotent."""
    AttentionInterface.register(NAME, prefix_attention_forward)
    AttentionMaskInterface.register(NAME, prefix_attention_mask)


register()
