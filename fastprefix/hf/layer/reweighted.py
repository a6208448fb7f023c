"""Attention with a bias or a gate of each head: see :class:`fastprefix.kv.Reweighting`.

The operator has one bias for each head. If the prefixes of a batch have different biases, there is
one call for each prefix, with the rows that have it. A gate takes two calls, one over the text and
one over the prefix. Neither way copies keys or values.
"""

from __future__ import annotations

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
    """An additive mask: a bool mask, and the biases of prefixes that were copied into the keys.

    Args:
        call: with a ``head_bias``.
        seen: [B, 1, Lq, Lk], True = attend.
        length: how many of the keys, at the front, belong to the prefix.

    Returns:
        [B, Hq, Lq, Lk].
    """
    bias = call.head_bias
    assert bias is not None
    index = call.options.prefix_index
    # a row without a prefix gets the last bias, for keys that the mask hides from it
    bias = bias[None] if index is None else bias[:, index].T
    front = bias[:, :, None, None].expand(*seen.shape[:1], -1, seen.shape[2], length)
    added = torch.nn.functional.pad(front, (0, seen.shape[3] - length))
    return added.masked_fill(~seen, float("-inf"))


def _biased(call: Call) -> Tensor:
    """[B, Hq, Lq, Dv]: the call with its ``head_bias``."""
    bias, options = call.head_bias, call.options
    if bias is None:
        return call.run()
    if options.prefix_index is None:
        return call.with_options(prefix_bias=_with_distances(bias, options.prefix_bias)).run()
    used = sorted({number for number in call.prefix_ids if number >= 0})
    if len(used) == 1:
        return call.with_options(prefix_bias=bias[:, used[0]]).run()
    if options.cu_seqlens is not None:
        raise NotImplementedError(
            "rows: got packed sequences whose prefixes differ in the biases of their heads, takes "
            "one prefix for all of them; or put each sequence into a row of its own"
        )
    groups: dict[int, list[int]] = {number: [] for number in used}
    repeats = call.query.shape[0] // len(call.prefix_ids)
    for row in range(call.query.shape[0]):
        number = call.prefix_ids[row // repeats]
        # a row without a prefix has no scores that a bias is added to: any group is right
        groups[number if number >= 0 else used[0]].append(row)
    parts = [
        _rows(call, rows).with_options(prefix_bias=bias[:, number]).run()
        for number, rows in groups.items()
    ]
    order = [row for rows in groups.values() for row in rows]
    places = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(parts)[torch.tensor(places, device=call.query.device)]


def _with_distances(bias: Tensor, distances: Tensor | None) -> Tensor:
    """A bias [Hq] plus the bias that a decoder has for distances, [Hq, Lq, P]."""
    if distances is None:
        return bias
    return bias[:, None, None] + distances


def _rows(call: Call, rows: list[int]) -> Call:
    """The call of some rows of the batch."""
    place = torch.tensor(rows, device=call.query.device)
    options = call.options
    mask, index, padding = options.attn_mask, options.prefix_index, options.key_padding_mask
    lengths = options.key_lengths
    if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
        mask = mask[place]
    call = call._replace(query=call.query[place], key=call.key[place], value=call.value[place])
    return call.with_options(
        prefix_index=None if index is None else index[place],
        attn_mask=mask,
        key_padding_mask=None if padding is None else padding[place],
        key_lengths=None if lengths is None else lengths[place],
    )


def _without_gated(call: Call) -> Call:
    """The call over the text and over those prefixes that have no gate."""
    ids = tuple(-1 if n in call.gated else n for n in call.prefix_ids)
    if call.options.prefix_index is None or max(ids) < 0:
        return call.without_prefix()
    return call._replace(prefix_ids=ids).with_options(prefix_index=_members(call, gated=False))


def _apart(call: Call, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The attention to the gated prefixes only, [B, Hq, Lq, Dv], and tanh of their gates.

    Rows without a gated prefix get zeros.
    """
    gate = torch.tanh(gate.to(torch.promote_types(call.query.dtype, torch.float32)))
    query, index, options = call.query, None, call.options
    packed = options.cu_seqlens is not None and options.prefix_index is not None
    if options.prefix_index is not None:
        index = _members(call, gated=True)
        if options.cu_seqlens is not None:
            # Without keys, a token needs no sequence: each becomes a row with one query.
            tokens = query.shape[2]
            index = index.repeat_interleave(options.cu_seqlens.diff(), output_size=tokens)
            query = query.transpose(0, 2)
        gate = gate[:, index].T
    else:
        gate = gate[None]
    B = query.shape[0]
    call = call._replace(
        query=query,
        key=call.key.new_empty(B, call.key.shape[1], 0, call.key.shape[3]),
        value=call.value.new_empty(B, call.value.shape[1], 0, call.value.shape[3]),
    )
    # the options of the text go, and the sinks, which belong to the text's softmax
    call = call.with_options(
        is_causal=False,
        key_padding_mask=None,
        key_lengths=None,
        attn_mask=None,
        cu_seqlens=None,
        sliding_window=None,
        prefix_in_window=False,
        sinks=None,
        prefix_index=index,
    )
    out = call.run()
    gate = gate[:, :, None, None]
    return (out.transpose(0, 2), gate.transpose(0, 2)) if packed else (out, gate)


def _members(call: Call, *, gated: bool) -> Tensor:
    """prefix_index of the prefixes with a gate (or of those without); -1 in the other rows."""
    index, lengths = call.options.prefix_index, call.options.prefix_lengths
    assert index is not None
    assert lengths is not None
    chosen = torch.tensor(
        [(n in call.gated) == gated for n in range(lengths.shape[0])], device=index.device
    )
    return torch.where(chosen[index], index, -1)  # -1 stays what it is
