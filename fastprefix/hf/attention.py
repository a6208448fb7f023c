"""The attention function that transformers calls in every layer of a patched model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from fastprefix.attention import prefix_attention
from fastprefix.hf.masks import prefix_attention_mask
from fastprefix.kv import PackedPrefixKV, PrefixKV

NAME = "fastprefix"
SLOT = "_fastprefix_slot"
# While models are probed: the modules that attended without a keyword argument of the forward call.
MISSED: list[list[nn.Module]] = []


@dataclass(frozen=True, eq=False)
class ActivePrefix:
    """What travels with a forward call, as its keyword argument ``fastprefix``.

    Attributes:
        kv: the prefix, or several of which a row picks one, or None for plain attention.
        backend: of :func:`fastprefix.prefix_attention`.
        prefix_index: with several prefixes int32 [R], which of them a row attends to, -1 for none;
            the hook makes it [B].
        positioned: whether the call's position_ids are already moved behind the prefix.
        cu_seqlens: offsets [M + 1] of sequences packed in one row, which stand for any mask.
        placement: how a windowed layer with an explicit mask learns how far a prompt slid: "end",
            its keys end at the newest token and text_mask says which are real; "mask", its mask
            says both (a static cache, packed sequences); "unknown", the mask is the user's own.
        text_mask: the call's attention mask [B, L], 1 = real token, up to the newest token; None
            for no padding.
        prefix_bias: [Hq, Lq, P], added to the prefix's scores in a decoder's own attention.
        turn: how often the layers at hand ran before in this call, where layers share modules.
        turns: the same, counted for each module that several layers share.
        masses: where each layer leaves the share of its attention that the prefix takes, by slot,
            [B, Hq, Lq] each; None for not at all.
    """

    kv: PrefixKV | PackedPrefixKV | None
    backend: str = "auto"
    prefix_index: Tensor | None = None
    positioned: bool = False
    cu_seqlens: Tensor | None = None
    placement: Literal["end", "mask", "unknown"] = "end"
    text_mask: Tensor | None = None
    prefix_bias: Tensor | None = None
    turn: int = 0
    turns: dict[int, int] = field(default_factory=dict)
    masses: dict[int, Tensor] | None = None


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
            no distance from any query, its bias is 0, unless its position_offset places the text
            behind it.
        kwargs: the rest of what models hand down; s_aux are the sinks [Hq].

    Returns:
        [B, Lq, Hq, Dv], and None for the weights, which are never formed.

    Raises:
        ValueError: the module has no slot for the prefix.
        NotImplementedError: the call needs what the operator does not have yet, the gradient of a
            bias among them.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if isinstance(fastprefix, ActivePrefix) and fastprefix.masses is not None:
        _measure(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            is_causal=is_causal,
            sliding_window=sliding_window,
            softcap=softcap,
            fastprefix=fastprefix,
            position_bias=position_bias,
            **kwargs,
        )
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    backend, prefix_key, prefix_value, in_window = "auto", None, None, False
    prefix_index = prefix_lengths = None
    longest = 0
    prefix_bias = None
    if isinstance(fastprefix, Recorder):
        fastprefix.record(module, key, value, causal)
    elif fastprefix is not None:
        backend = fastprefix.backend
        if fastprefix.kv is not None:
            slot = _slot(module, fastprefix.turn)
            prefix_key, prefix_value = fastprefix.kv.layer(slot)
            in_window, longest = fastprefix.kv.in_window, prefix_key.shape[1]
            if isinstance(fastprefix.kv, PackedPrefixKV):
                prefix_index = fastprefix.prefix_index
                prefix_lengths = fastprefix.kv.prefix_lengths[slot]
                longest = fastprefix.kv.longest[slot]
            if fastprefix.prefix_bias is not None and causal and prefix_key.shape[1]:
                prefix_bias = fastprefix.prefix_bias[..., : prefix_key.shape[1]].to(query.dtype)
    elif MISSED:
        for missed in MISSED:
            missed.append(module)

    if prefix_key is not None and prefix_value is not None:
        prefix_key = prefix_key.to(query.device, query.dtype)
        prefix_value = prefix_value.to(query.device, query.dtype)
    if prefix_index is not None and prefix_lengths is not None:
        prefix_index, prefix_lengths = (
            prefix_index.to(query.device),
            prefix_lengths.to(query.device),
        )

    key_padding_mask = attn_mask = cu_seqlens = None
    B, Lk, window = key.shape[0], key.shape[2], sliding_window
    P = longest if in_window else 0
    if window is not None and P + Lk <= window:
        window = None  # everything lies within it
    in_window = P > 0 and window is not None
    if in_window and not causal:
        raise NotImplementedError(
            f"{type(module).__name__} has a sliding_window of {window} on both sides, which a "
            "prompt does not slide out of yet"
        )
    if in_window and isinstance(fastprefix, ActivePrefix) and not _all_slide(fastprefix):
        raise NotImplementedError(
            f"{type(module).__name__} has a sliding_window of {window}, out of which prompts slide "
            "and learned prefixes do not; not supported in one batch: run them apart"
        )
    if isinstance(fastprefix, ActivePrefix) and fastprefix.cu_seqlens is not None:
        cu_seqlens = fastprefix.cu_seqlens.to(query.device)
    elif attention_mask is not None and attention_mask.dim() == 2:
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
                _tail(
                    prefix_key,
                    prefix_value,
                    B,
                    min(longest, window - 1),
                    prefix_index,
                    prefix_lengths,
                ),
                key,
                value,
                attention_mask,
                window,
            )
            prefix_key = prefix_value = prefix_index = prefix_lengths = None
            key_padding_mask = window = None
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
        prefix_index=prefix_index,
        prefix_lengths=prefix_lengths,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        is_causal=causal,
        dropout_p=dropout,
        scale=scaling,
        sliding_window=window,
        softcap=softcap,
        sinks=sinks,
        prefix_bias=prefix_bias,
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


def _measure(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    fastprefix: ActivePrefix,
    **kwargs: Any,
) -> None:
    """Leaves the share of a layer's attention that falls on the prefix in ``fastprefix.masses``.

    It is the layer's own output when the values are 1 in the prefix and 0 in the text.
    """
    kv, masses = fastprefix.kv, fastprefix.masses
    if kv is None or masses is None:
        return
    ones = replace(kv, values=tuple(map(torch.ones_like, kv.values)))
    share, _ = prefix_attention_forward(
        module,
        query,
        key,
        torch.zeros_like(value),
        attention_mask,
        fastprefix=replace(fastprefix, kv=ones, masses=None),
        **kwargs,
    )
    masses[_slot(module, fastprefix.turn)] = share[..., 0].transpose(1, 2).float()


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


def _all_slide(active: ActivePrefix) -> bool:
    """Whether all prefixes of a call slide out of windows, as prompts do."""
    return not isinstance(active.kv, PackedPrefixKV) or all(active.kv.windowed)


def _tail(
    prefix_key: Tensor,
    prefix_value: Tensor,
    B: int,
    length: int,
    prefix_index: Tensor | None,
    prefix_lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Copies of the last tokens of every row's prefix, aligned to the end; and which are its own.

    Returns:
        [B, Hkv, length, D], [B, Hkv, length, Dv], and bool [B, 1, 1, length], None for all.
    """
    if prefix_index is None or prefix_lengths is None:
        start = prefix_key.shape[1] - length
        key, value = (x[:, start:].expand(B, -1, -1, -1) for x in (prefix_key, prefix_value))
        return key, value, None
    # -1 takes the zero
    ends, lengths = (
        torch.cat([x, x.new_zeros(1)]) for x in (prefix_lengths.cumsum(0), prefix_lengths)
    )
    column = torch.arange(-length, 0, device=prefix_key.device)
    own = column >= -lengths[prefix_index][:, None]  # [B, length]
    place = (ends[prefix_index][:, None] + column).clamp(min=0)
    key, value = (x[:, place].transpose(0, 1) for x in (prefix_key, prefix_value))
    return key, value, own[:, None, None]


def _in_front(
    tail: tuple[Tensor, Tensor, Tensor | None],
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
    tail_key, tail_value, own = tail
    before = mask.sum(-1, keepdim=True) - 1  # [B, 1, Lq, 1]
    gap = torch.arange(tail_key.shape[2], 0, -1, device=key.device) + before
    seen = gap < window if own is None else (gap < window) & own
    key, value = torch.cat([tail_key, key], 2), torch.cat([tail_value, value], 2)
    return key, value, torch.cat([seen, mask], -1)


def register() -> None:
    """Makes "fastprefix" an ``attn_implementation`` of transformers. Idempotent."""
    AttentionInterface.register(NAME, prefix_attention_forward)
    AttentionMaskInterface.register(NAME, prefix_attention_mask)


register()
