"""Attention with a bias or a gate of each head: see :class:`fastprefix.kv.Reweighting`.

The operator takes one bias for each head. Rows of a mixed batch whose prefixes differ in it are
called apart, prefix by prefix. Gates are two calls, of the text and of the prefix, each over what
there is one copy of.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastprefix.hf.layer.call import Call


def attend(call: Call) -> Tensor:
    """[B, Hq, Lq, Dv]: the call with its ``head_bias`` and its ``gate``.

    Raises:
        NotImplementedError: packed sequences whose prefixes differ in their biases.
    """
    if call.gate is None:
        return _biased(call)
    out = _biased(_without_gated(call))
    apart, gate = _apart(call, call.gate)
    return (out + gate * apart).to(out.dtype)


def added_to_mask(call: Call, seen: Tensor, length: int) -> Tensor:
    """A bool mask as an additive one with the biases of prefixes that were copied into the keys.

    Args:
        call: with a ``head_bias``.
        seen: [B, 1, Lq, Lk], True = attend.
        length: how many of the keys are the prefix's, at the front.

    Returns:
        [B, Hq, Lq, Lk].
    """
    bias = call.head_bias
    assert bias is not None
    if call.prefix_index is None:
        bias = bias[None]
    else:
        bias = bias[:, call.prefix_index].T  # a row without a prefix sees none of it
    front = bias[:, :, None, None].expand(*seen.shape[:1], -1, seen.shape[2], length)
    added = torch.nn.functional.pad(front, (0, seen.shape[3] - length))
    return added.masked_fill(~seen, float("-inf"))


def _biased(call: Call) -> Tensor:
    bias = call.head_bias
    if bias is None:
        return call.run()
    if call.prefix_index is None:
        return replace(call, prefix_bias=_with_distances(bias, call.prefix_bias)).run()
    used = sorted({number for number in call.numbers if number >= 0})
    if len(used) == 1:
        return replace(call, prefix_bias=bias[:, used[0]]).run()
    if call.cu_seqlens is not None:
        raise NotImplementedError(
            "rows: got packed sequences whose prefixes differ in the biases of their heads, takes "
            "one prefix for all of them; or put each sequence into a row of its own"
        )
    groups: dict[int, list[int]] = {number: [] for number in used}
    repeats = call.query.shape[0] // len(call.numbers)
    for row in range(call.query.shape[0]):
        number = call.numbers[row // repeats]
        groups[number if number >= 0 else used[0]].append(row)  # no prefix, and so no bias
    parts = [
        replace(_rows(call, rows), prefix_bias=bias[:, number]).run()
        for number, rows in groups.items()
    ]
    order = [row for rows in groups.values() for row in rows]
    places = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(parts)[torch.tensor(places, device=call.query.device)]


def _with_distances(bias: Tensor, distances: Tensor | None) -> Tensor:
    """[Hq] with what a decoder adds for distances, [Hq, Lq, P]."""
    if distances is None:
        return bias
    return bias[:, None, None] + distances


def _rows(call: Call, rows: list[int]) -> Call:
    """Some rows of a call alone."""
    place = torch.tensor(rows, device=call.query.device)
    mask = call.attn_mask
    if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
        mask = mask[place]
    padding = call.key_padding_mask
    return replace(
        call,
        query=call.query[place],
        key=call.key[place],
        value=call.value[place],
        prefix_index=None if call.prefix_index is None else call.prefix_index[place],
        attn_mask=mask,
        key_padding_mask=None if padding is None else padding[place],
    )


def _without_gated(call: Call) -> Call:
    """The text, with those prefixes that share its softmax."""
    numbers = tuple(-1 if n in call.gated else n for n in call.numbers)
    if call.prefix_index is None or max(numbers) < 0:
        return replace(
            call,
            prefix_key=None,
            prefix_value=None,
            prefix_index=None,
            prefix_lengths=None,
            prefix_bias=None,
            head_bias=None,
        )
    return replace(call, prefix_index=_members(call, gated=False), numbers=numbers)


def _apart(call: Call, gate: Tensor) -> tuple[Tensor, Tensor]:
    """[B, Hq, Lq, Dv] over the gated prefixes alone, and tanh of the gates to multiply it with.

    Zeros for rows without a gated prefix.
    """
    gate = torch.tanh(gate.to(torch.promote_types(call.query.dtype, torch.float32)))
    query, index = call.query, None
    packed = call.cu_seqlens is not None and call.prefix_index is not None
    if call.prefix_index is not None:
        index = _members(call, gated=True)
        if call.cu_seqlens is not None:  # tokens as rows of one query, since there are no keys
            tokens = query.shape[2]
            index = index.repeat_interleave(call.cu_seqlens.diff(), output_size=tokens)
            query = query.transpose(0, 2)
        gate = gate[:, index].T
    else:
        gate = gate[None]
    B = query.shape[0]
    out = Call(
        query,
        call.key.new_empty(B, call.key.shape[1], 0, call.key.shape[3]),
        call.value.new_empty(B, call.value.shape[1], 0, call.value.shape[3]),
        call.prefix_key,
        call.prefix_value,
        index,
        call.prefix_lengths,
        call.prefix_bias,
        options={**call.options, "sinks": None},
    ).run()
    gate = gate[:, :, None, None]
    return (out.transpose(0, 2), gate.transpose(0, 2)) if packed else (out, gate)


def _members(call: Call, *, gated: bool) -> Tensor:
    """prefix_index with -1 for the prefixes that are, or are not, gated."""
    index, lengths = call.prefix_index, call.prefix_lengths
    assert index is not None
    assert lengths is not None
    chosen = torch.tensor(
        [(n in call.gated) == gated for n in range(lengths.shape[0])], device=index.device
    )
    return torch.where(chosen[index], index, -1)  # -1 stays what it is
