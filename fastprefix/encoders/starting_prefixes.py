"""Prefixes to start from: orthogonal tokens, or another prefix that is made longer or shorter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from fastprefix.arguments import refuses_unknown_arguments
from fastprefix.kv import PrefixKV
from fastprefix.kv.flat import FlatLayout

Resize = Literal["pad", "repeat", "resample"]


@refuses_unknown_arguments
def orthogonal(layout: FlatLayout, std: float) -> Tensor:
    """Draws a random prefix whose virtual tokens are orthogonal in every layer.

    Keys are orthogonal to keys, and values to values. They come from the QR decomposition of a
    normal matrix [P, Hkv · D], whose rows are the tokens. If there are more tokens than numbers in
    one token, the columns are orthogonal instead.

    Args:
        layout: the layout of the prefix.
        std: the root mean square of its numbers.

    Returns:
        [P, width], in the order of the layout.
    """
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for shape, length in zip(layout.shapes, layout.lengths, strict=True):
        for size, tensors in ((shape.key_size, keys), (shape.value_size, values)):
            tokens = torch.empty(length, shape.num_heads * size)
            if length:
                torch.nn.init.orthogonal_(tokens, std * max(tokens.shape) ** 0.5)
            tensors.append(tokens.unflatten(1, (shape.num_heads, size)).transpose(0, 1))
    return layout.to_flat(PrefixKV(tuple(keys), tuple(values), 0))


@refuses_unknown_arguments
def resize(
    kv: PrefixKV, lengths: int | Sequence[int], method: Resize = "pad", *, pad_std: float = 0.02
) -> PrefixKV:
    """Makes a prefix of another length, from which training can start.

    Args:
        kv: the prefix.
        lengths: the number of virtual tokens of all layers, or of each layer; 0 for no prefix.
        method: "pad" and "repeat" keep the first tokens. If more are needed, "pad" appends random
            ones, and "repeat" starts again with the first. "resample" interpolates linearly along
            the tokens; the first and the last stay the same. With rotary positions, interpolated
            keys are only a rough start.
        pad_std: the standard deviation of the random tokens.

    Returns:
        A learned prefix: it does not slide out of windows, and position_offset is its length.

    Raises:
        ValueError: the method is unknown; lengths do not fit; or "repeat" or "resample" should make
            tokens for a layer that has none.
    """
    if method not in get_args(Resize):
        raise ValueError(f"method: got {method!r}, takes one of {get_args(Resize)}")
    layout = FlatLayout.make(kv.shapes, lengths)

    def change(tensor: Tensor, length: int) -> Tensor:
        P = tensor.shape[1]
        if length == P:
            return tensor
        if length and not P and method != "pad":
            raise ValueError(
                f"kv: got a layer without a prefix, of which method={method!r} cannot make "
                f"{length} tokens; method='pad' can"
            )
        if method == "resample" and length:
            place = torch.linspace(0, P - 1, length, dtype=torch.float64, device=tensor.device)
            low = place.floor().long().clamp(max=max(P - 2, 0))
            weight = (place - low)[:, None].to(tensor.dtype)
            return tensor[:, low].lerp(tensor[:, (low + 1).clamp(max=P - 1)], weight)
        if method == "repeat" and length > P:
            return tensor.repeat(1, -(-length // P), 1)[:, :length]
        more = max(length - P, 0)
        noise = pad_std * torch.randn(tensor.shape[0], more, tensor.shape[2])
        return torch.cat([tensor[:, :length], noise.to(tensor)], dim=1)

    keys, values = (
        tuple(change(x, length) for x, length in zip(tensors, layout.lengths, strict=True))
        for tensors in (kv.keys, kv.values)
    )
    offset = layout.num_virtual_tokens
    return replace(kv, keys=keys, values=values, position_offset=offset, in_window=False)
