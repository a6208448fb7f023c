"""Layers with sliding windows: prompts slide out of them as the text grows, learned prefixes stay.

The operator does both where a row's keys end at its newest token. This module finds out whether
they do, what of them is real, and copies the end of a prompt in front of the keys where neither the
operator nor the mask alone can tell.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fastprefix.hf.layer.active import ActivePrefix
from fastprefix.hf.layer.call import Call
from fastprefix.hf.layer.reweighted import added_to_mask
from fastprefix.kv import PackedPrefixKV


def in_window(module: nn.Module, call: Call, active: ActivePrefix | None, longest: int) -> Call:
    """A call that has its window only where something lies beyond, prompts among it.

    Args:
        module: for messages.
        call: with a sliding_window, or none.
        active: the call's prefixes.
        longest: how many tokens of a prompt may slide; 0 for a learned prefix.

    Raises:
        NotImplementedError: a window on both sides, or prompts beside learned prefixes.
    """
    window = call.sliding_window
    if window is None:
        return call
    if longest + call.key.shape[2] <= window:
        return replace(call, sliding_window=None)  # everything lies within it
    if not longest:
        return call
    if not call.is_causal:
        raise NotImplementedError(
            f"{type(module).__name__} has a sliding_window of {window} on both sides, which a "
            "prompt does not slide out of yet"
        )
    if active is not None and not _all_slide(active):
        raise NotImplementedError(
            f"{type(module).__name__} has a sliding_window of {window}, out of which prompts slide "
            "and learned prefixes do not; not supported in one batch: run them apart"
        )
    return replace(call, prefix_in_window=True)


def with_mask(
    module: nn.Module, call: Call, active: ActivePrefix | None, mask: Tensor, longest: int
) -> Call:
    """A call with an explicit mask, or with padding that is given as one; neither is cut again.

    Args:
        module: for messages.
        call: as :func:`in_window` left it.
        active: the call's prefixes.
        mask: [B, 1 or Hq, Lq, Lk].
        longest: see :func:`in_window`.

    Raises:
        NotImplementedError: it does not say where a prompt, which slides, stands.
    """
    B, Lk, window = call.key.shape[0], call.key.shape[2], call.sliding_window
    call = replace(call, is_causal=False, sliding_window=None)  # the mask has it
    if mask.dtype is torch.bool and mask.shape[1:] == (1, 1, Lk):
        call.key_padding_mask = mask[:, 0, 0].expand(B, Lk)
    else:
        call.attn_mask = mask
    if not call.prefix_in_window or active is None or window is None:
        return call
    if active.placement == "mask" and mask.dtype is torch.bool:
        return _in_front(call, mask, min(longest, window - 1), window)
    real = _real_tokens(module, active, Lk, window)
    # The window of the operator hides no more of the text than the mask does already; that of a
    # single query says what is real as far as the window reaches.
    call.key_padding_mask = real if call.attn_mask is not None else call.key_padding_mask
    return replace(call, sliding_window=window)


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


def _in_front(call: Call, mask: Tensor, length: int, window: int) -> Call:
    """What of a prompt a window can hold, copied in front of every row's keys; and their mask.

    For layers whose keys do not end at the newest token: a window's worth of copies, where the
    operator would need none. The mask counts the real tokens before a query as far as the window
    reaches, and beyond it no token of the prompt is seen.
    """
    tail_key, tail_value, own = _tail(call, length)
    before = mask.sum(-1, keepdim=True) - 1  # [B, 1, Lq, 1]
    gap = torch.arange(length, 0, -1, device=mask.device) + before
    seen = gap < window if own is None else (gap < window) & own
    attn_mask = torch.cat([seen, mask], -1)
    if call.head_bias is not None:
        attn_mask = added_to_mask(call, attn_mask, length)
    return replace(
        call,
        key=torch.cat([tail_key, call.key], 2),
        value=torch.cat([tail_value, call.value], 2),
        prefix_key=None,
        prefix_value=None,
        prefix_index=None,
        prefix_lengths=None,
        prefix_in_window=False,
        attn_mask=attn_mask,
        head_bias=None,
        key_padding_mask=None,
    )


def _tail(call: Call, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Copies of the last tokens of every row's prefix, aligned to the end; and which are its own.

    Returns:
        [B, Hkv, length, D], [B, Hkv, length, Dv], and bool [B, 1, 1, length], None for all.
    """
    B, prefix_lengths, prefix_index = call.key.shape[0], call.prefix_lengths, call.prefix_index
    assert call.prefix_key is not None
    assert call.prefix_value is not None
    tensors = (call.prefix_key, call.prefix_value)
    if prefix_index is None or prefix_lengths is None:
        start = call.prefix_key.shape[1] - length
        key, value = (x[:, start:].expand(B, -1, -1, -1) for x in tensors)
        return key, value, None
    # -1 takes the zero
    ends, lengths = (
        torch.cat([x, x.new_zeros(1)]) for x in (prefix_lengths.cumsum(0), prefix_lengths)
    )
    column = torch.arange(-length, 0, device=call.key.device)
    own = column >= -lengths[prefix_index][:, None]  # [B, length]
    place = (ends[prefix_index][:, None] + column).clamp(min=0)
    key, value = (x[:, place].transpose(0, 1) for x in tensors)
    return key, value, own[:, None, None]
