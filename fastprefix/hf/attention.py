"""The attention function that transformers calls in every layer of a patched model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from fastprefix.attention import prefix_attention
from fastprefix.hf.masks import prefix_attention_mask
from fastprefix.kv import PrefixKV

NAME = "fastprefix"
SLOT = "_fastprefix_slot"
# While models are probed: the modules that attended without a keyword argument of the forward call.
MISSED: list[list[nn.Module]] = []


@dataclass(frozen=True, eq=False)
class ActivePrefix:
    """What travels with a forward call, as its keyword argument ``fastprefix``.

    Attributes:
        kv: the prefix, or None for plain attention.
        backend: of :func:`fastprefix.prefix_attention`.
        positioned: whether the call's position_ids are already moved behind the prefix.
        placement: how a windowed layer with an explicit mask learns how far a prompt slid: "end",
            its keys end at the newest token and text_mask says which are real; "mask", its mask
            says both (a static cache, packed sequences); "unknown", the mask is the user's own.
        text_mask: the call's attention mask [B, L], 1 = real token, up to the newest token; None
            for no padding.
        turn: how often the layers at hand ran before in this call, where layers share modules.
        turns: the same, counted for each module that several layers share.
    """

    kv: PrefixKV | None
    backend: str = "auto"
    positioned: bool = False
    placement: Literal["end", "mask", "unknown"] = "end"
    text_mask: Tensor | None = None
    turn: int = 0
    turns: dict[int, int] = field(default_factory=dict)


@dataclass(eq=False)
class Recorder:
    """Travels like :class:`ActivePrefix`, and keeps what each attention layer was handed.

    Attributes:
        modules: the attention modules in the order of their calls.
        keys: [B, Hkv, L, D] of each call.
        values: [B, Hkv, L, Dv] of each call.
        causal: whether each call was causal.
    """

    modules: list[nn.Module] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    causal: list[bool] = field(default_factory=list)

    def record(self, module: nn.Module, key: Tensor, value: Tensor, causal: bool) -> None:
        """Keeps one call."""
        self.modules.append(module)
        self.keys.append(key)
        self.values.append(value)
        self.causal.append(causal)


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
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers' AttentionInterface.

    Args:
        module: the attention module; its slot says which layer of the prefix is its own.
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D], from the cache where there is one: the text alone.
        value: [B, Hkv, Lk, Dv].
        attention_mask: as :mod:`fastprefix.hf.masks` makes it, or a custom mask of 4 dimensions.
        dropout: share of the attention weights that is dropped; models give 0 in evaluation.
        scaling: factor on the scores.
        is_causal: overrides the module's own.
        sliding_window: how many keys a query sees, itself included. An explicit mask has it
            inside already, and is not cut again.
        softcap: of the scores.
        fastprefix: what the hook of a patched model injected.
        position_bias: [1 or B, Hq, Lq, Lk], added to the text's scores (T5). The prefix stands at
            no distance from any query: its bias is 0.
        kwargs: the rest of what models hand down; s_aux are the sinks [Hq].

    Returns:
        [B, Lq, Hq, Dv], and None for the weights, which are never formed.

    Raises:
        ValueError: the module has no slot for the prefix.
        NotImplementedError: the call needs what the operator does not have yet, the gradient of a
            bias among them.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    backend, prefix_key, prefix_value, in_window = "auto", None, None, False
    if isinstance(fastprefix, Recorder):
        fastprefix.record(module, key, value, causal)
    elif fastprefix is not None:
        backend = fastprefix.backend
        if fastprefix.kv is not None:
            prefix_key, prefix_value = fastprefix.kv.layer(_slot(module, fastprefix.turn))
            in_window = fastprefix.kv.in_window
    elif MISSED:
        for missed in MISSED:
            missed.append(module)

    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if prefix_key is not None and prefix_value is not None:
        prefix_key = prefix_key.to(query.device, query.dtype)
        prefix_value = prefix_value.to(query.device, query.dtype)

    key_padding_mask = attn_mask = None
    B, Lk, window = key.shape[0], key.shape[2], sliding_window
    P = prefix_key.shape[1] if prefix_key is not None and in_window else 0
    if window is not None and P + Lk <= window:
        window = None  # everything lies within it
    in_window = P > 0 and window is not None
    if in_window and not causal:
        raise NotImplementedError(
            f"{type(module).__name__} has a sliding_window of {window} on both sides, which a "
            "prompt does not slide out of yet"
        )
    if attention_mask is not None and attention_mask.dim() == 2:
        key_padding_mask = attention_mask
    elif attention_mask is not None:
        causal = False
        if attention_mask.dtype is torch.bool and attention_mask.shape[1:] == (1, 1, Lk):
            key_padding_mask = attention_mask[:, 0, 0].expand(B, Lk)
        else:
            attn_mask = attention_mask
        active = fastprefix if in_window and isinstance(fastprefix, ActivePrefix) else None
        if active is None or window is None or prefix_key is None or prefix_value is None:
            window = None  # the mask has it
        elif active.placement == "mask" and attention_mask.dtype is torch.bool:
            key, value, attn_mask = _in_front(
                prefix_key, prefix_value, key, value, attention_mask, window
            )
            prefix_key = prefix_value = key_padding_mask = window = None
            in_window = False
        else:
            real = _real_tokens(module, active, Lk, window)
            # The window of the operator hides no more of the text than the mask does already; that
            # of a single query says what is real as far as the window reaches.
            key_padding_mask = real if attn_mask is not None else key_padding_mask
    if position_bias is not None:
        attn_mask = _with_bias(position_bias, attn_mask, query.dtype)
    if attn_mask is not None and attn_mask.requires_grad:
        raise NotImplementedError(
            f"{type(module).__name__}: a bias on the scores gets no gradient yet; freeze what "
            "makes it (requires_grad_(False)), or unpatch the model to train it"
        )
    sinks = kwargs.get("s_aux")
    if sinks is not None and sinks.dtype is not torch.float32:
        sinks = sinks.to(query.dtype)

    out = prefix_attention(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        is_causal=causal,
        dropout_p=dropout,
        scale=scaling,
        sliding_window=window,
        softcap=softcap,
        sinks=sinks,
        prefix_in_window=in_window,
        backend=backend,
    )
    return out.transpose(1, 2), None


def _slot(module: nn.Module, turn: int) -> int:
    """Which layer of the prefix is a module's own when it runs for the turn-th time in a call."""
    slots = getattr(module, SLOT, ())
    if turn < len(slots):
        return slots[turn]
    if slots:
        raise ValueError(
            f"{type(module).__name__}: ran more often in one call than the {len(slots)} times when "
            "the model was patched; recomputing shared layers one by one is not supported"
        )
    raise ValueError(
        f"{type(module).__name__}: this layer did not run when the model was patched, "
        "so it has no share in the prefix; patch the model as you run it"
    )


def _with_bias(bias: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """An additive mask [1 or B, Hq, Lq, Lk] that holds both."""
    if bias.is_leaf and not isinstance(bias, nn.Parameter):
        bias = bias.detach()  # T5 asks for the gradient of zeros when it checkpoints
    if bias.dtype is not torch.float32:
        bias = bias.to(dtype)
    if mask is None:
        return bias
    if mask.dtype is torch.bool:
        return bias.masked_fill(~mask, float("-inf"))
    return bias + mask


def _real_tokens(module: nn.Module, active: ActivePrefix, Lk: int, window: int) -> Tensor | None:
    """Which of a windowed layer's keys are real, [B, Lk], where its mask is explicit."""
    problem = None
    if active.placement != "end":
        problem = "an attention mask of the user's own, which does not say what is padding"
    elif active.text_mask is not None and active.text_mask.shape[1] < Lk:
        problem = f"an attention mask of {active.text_mask.shape[1]} tokens for {Lk}"
    if problem is not None:
        raise NotImplementedError(
            f"{type(module).__name__} has a sliding_window of {window}, out of which the prompt "
            f"slides as the text grows; not supported with {problem}"
        )
    if active.text_mask is None:
        return None
    return active.text_mask[:, active.text_mask.shape[1] - Lk :].bool()


def _in_front(
    prefix_key: Tensor,
    prefix_value: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What of a prompt a window can hold, copied in front of every row's keys; and their mask.

    For layers whose keys do not end at the newest token: a window's worth of copies, where the
    operator would need none. The mask counts the real tokens before a query as far as the window
    reaches, and beyond it no token of the prompt is seen.
    """
    B, P = key.shape[0], prefix_key.shape[1]
    tail = min(P, window - 1)
    before = mask.sum(-1, keepdim=True) - 1  # [B, 1, Lq, 1]
    gap = torch.arange(tail, 0, -1, device=key.device) + before
    copies = (x[:, P - tail :].expand(B, -1, -1, -1) for x in (prefix_key, prefix_value))
    key, value = (torch.cat(pair, 2) for pair in zip(copies, (key, value), strict=True))
    return key, value, torch.cat([gap < window, mask], -1)


def register() -> None:
    """Makes "fastprefix" an ``attn_implementation`` of transformers. Idempotent."""
    AttentionInterface.register(NAME, prefix_attention_forward)
    AttentionMaskInterface.register(NAME, prefix_attention_mask)


register()
