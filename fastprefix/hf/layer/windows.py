"""Layers with sliding windows: prompts slide out of them as the text grows, learned prefixes stay.

The operator does both if it knows where a row's newest token stands: behind the last key, or where
key_lengths says. This module finds out which of the two holds, and which keys are real. If neither
holds, but the mask tells where a prompt stands, it copies the end of the prompt in front of the
keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastprefix.attention.selection import has_feature
from fastprefix.hf.layer.active import ActivePrefix
from fastprefix.hf.layer.buffered import is_packed, unpack
from fastprefix.hf.layer.call import Call
from fastprefix.hf.layer.reweighted import added_to_mask
from fastprefix.kv import PackedPrefixKV


def in_window(module: nn.Module, call: Call, active: ActivePrefix | None, longest: int) -> Call:
    """The call with its window if the window hides anything, and with prompts that slide out of it.

    Args:
        module: for messages.
        call: with or without a sliding_window.
        active: the call's prefixes.
        longest: how many tokens of a prompt may slide; 0 for a learned prefix.

    Raises:
        NotImplementedError: a window on both sides, or prompts beside learned prefixes.
    """
    window = call.options.sliding_window
    if window is None:
        return call
    if longest + call.key.shape[2] <= window:
        return call.with_options(sliding_window=None)  # everything lies within it
    if not longest:
        return call
    if not call.options.is_causal:
        raise NotImplementedError(
            f"{type(module).__name__} has a sliding_window of {window} on both sides, which a "
            "prompt does not slide out of yet"
        )
    if active is not None and not _all_slide(active):
        raise NotImplementedError(
            f"{type(module).__name__} has a sliding_window of {window}, out of which prompts slide "
            "and learned prefixes do not; not supported in one batch: run them apart"
        )
    return call.with_options(prefix_in_window=True)


def with_mask(
    module: nn.Module, call: Call, active: ActivePrefix | None, mask: Tensor, longest: int
) -> Call:
    """The call with a mask of four dimensions, in whatever form :mod:`.masks` made it.

    Args:
        module: for messages.
        call: as :func:`in_window` left it.
        active: the call's prefixes.
        mask: see :mod:`fastprefix.hf.layer.masks`.
        longest: see :func:`in_window`.

    Raises:
        NotImplementedError: a prompt slides, and the mask does not say where it stands.
    """
    if is_packed(mask):
        return _with_buffered(module, call, active, mask, longest)
    return _with_explicit(module, call, active, mask, longest)


def _with_buffered(
    module: nn.Module, call: Call, active: ActivePrefix | None, mask: Tensor, longest: int
) -> Call:
    """:func:`with_mask` for a mask that says which keys of a buffer are in use."""
    Lk, window = call.key.shape[2], call.options.sliding_window
    buffered = unpack(mask, Lk)
    if buffered.windowed and window is None:
        window = _own_window(module, Lk)
    elif not (buffered.windowed or call.options.prefix_in_window):
        window = None  # as in other attention functions, where the mask decides
    if not has_feature(call.backend, call.query.device.type, "key_lengths"):
        return _with_explicit(module, call, active, buffered.dense(call.query, Lk, window), longest)
    return call.with_options(
        sliding_window=window,
        key_lengths=buffered.key_lengths,
        key_padding_mask=buffered.key_padding_mask,
    )


def _own_window(module: nn.Module, Lk: int) -> int | None:
    """The window of a module that does not pass it on, by its config; None if it hides nothing."""
    window: int | None = getattr(getattr(module, "config", None), "sliding_window", None)
    if window is None:
        raise NotImplementedError(
            f"{type(module).__name__}: got a mask with a sliding window, takes sliding_window as "
            "an argument of its attention or in its config"
        )
    return None if Lk <= window else window


def _with_explicit(
    module: nn.Module, call: Call, active: ActivePrefix | None, mask: Tensor, longest: int
) -> Call:
    """:func:`with_mask` for a mask [B, 1 or Hq, Lq, Lk], or for padding that has the form of one.

    The mask contains the window and causality already, so the text is not cut a second time.
    """
    B, Lk, window = call.key.shape[0], call.key.shape[2], call.options.sliding_window
    padding = mask.dtype is torch.bool and mask.shape[1:] == (1, 1, Lk)
    call = call.with_options(
        is_causal=False,
        sliding_window=None,
        **{"key_padding_mask": mask[:, 0, 0].expand(B, Lk)} if padding else {"attn_mask": mask},
    )
    if not call.options.prefix_in_window or active is None or window is None:
        return call
    if active.placement == "mask" and mask.dtype is torch.bool:
        return _in_front(call, mask, min(longest, window - 1), window)
    real = _real_tokens(module, active, Lk, window)
    # The operator's window hides nothing of the text that the mask does not hide already. Padding
    # says which keys are real; for a single query it does so only as far as the window reaches.
    if not padding:
        call = call.with_options(key_padding_mask=real)
    return call.with_options(sliding_window=window)


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
    """The call with the end of the prompt copied in front of every row's keys, and with its mask.

    This is for layers whose keys do not end at the newest token. Only as many tokens are copied as
    a window can hold. The mask counts the real tokens before a query as far as the window reaches;
    a query with more tokens before it sees nothing of the prompt.
    """
    tail_key, tail_value, own = _tail(call, length)
    before = mask.sum(-1, keepdim=True) - 1  # [B, 1, Lq, 1]
    gap = torch.arange(length, 0, -1, device=mask.device) + before
    seen = gap < window if own is None else (gap < window) & own
    attn_mask = torch.cat([seen, mask], -1)
    if call.head_bias is not None:
        attn_mask = added_to_mask(call, attn_mask, length)
    call = call._replace(
        key=torch.cat([tail_key, call.key], 2), value=torch.cat([tail_value, call.value], 2)
    )
    return call.without_prefix().with_options(attn_mask=attn_mask, key_padding_mask=None)


def _tail(call: Call, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Copies of the last tokens of every row's prefix, aligned to the end.

    Returns:
        Keys [B, Hkv, length, D], values [B, Hkv, length, Dv], and bool [B, 1, 1, length]: which of
        them belong to the row's own prefix. None if all do.
    """
    B = call.key.shape[0]
    prefix_lengths, prefix_index = call.options.prefix_lengths, call.options.prefix_index
    assert call.prefix_key is not None
    assert call.prefix_value is not None
    tensors = (call.prefix_key, call.prefix_value)
    if prefix_index is None or prefix_lengths is None:
        start = call.prefix_key.shape[1] - length
        key, value = (x[:, start:].expand(B, -1, -1, -1) for x in tensors)
        return key, value, None
    # a row without a prefix (index -1) gets the zero at the end
    ends, lengths = (
        torch.cat([x, x.new_zeros(1)]) for x in (prefix_lengths.cumsum(0), prefix_lengths)
    )
    column = torch.arange(-length, 0, device=call.key.device)
    own = column >= -lengths[prefix_index][:, None]  # [B, length]
    place = (ends[prefix_index][:, None] + column).clamp(min=0)
    key, value = (x[:, place].transpose(0, 1) for x in tensors)
    return key, value, own[:, None, None]
