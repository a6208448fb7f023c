"""A KV cache with a prefix in front of each row's text, which shows only the text.

The caller of a model, above all ``generate()``, counts the tokens of a cache as tokens of the text.
Therefore the length of these layers leaves the prefix out. Only within the forward of the model it
counts: the hooks in :mod:`fastprefix.hf.expand.hooks` say when that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from fastprefix.hf.layer.active import ActivePrefix
from fastprefix.kv import PackedPrefixKV, PrefixKV


@dataclass(frozen=True)
class Expanded:
    """How a model that could not be patched takes prefixes through its KV cache.

    Attributes:
        reason: why it could not be patched.
        by_slots: whether it counts the slots of its cache or mask as positions (alibi). A prefix
            then takes as many positions as it has tokens. Otherwise position_ids decide.
        pads_free: whether padding on the left of a text leaves the results as they are.
        limit: how many positions the model has learned; None for any.
    """

    reason: str
    by_slots: bool
    pads_free: bool
    limit: int | None = None


class ExpandedLayer(DynamicLayer):
    """One layer: F slots of the prefix, and the text, for each row.

    Pads on the left of a row are moved in front of its prefix. So all distances are those in the
    concatenation [pads, prefix, text].

    Args:
        keys: [B, Hkv, F, D], the prefix of each row.
        values: [B, Hkv, F, Dv].
        pads: [B], how many tokens of each row's text to move in front of its prefix; None for none.
        active: the active prefix that the rows were made of.

    Attributes:
        front: F.
        inside: whether the model's forward is running. The length then counts the prefix as well.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, pads: Tensor | None, active: ActivePrefix
    ) -> None:
        super().__init__()
        self.keys, self.values, self.pads, self.active = keys, values, pads, active
        self.device, self.dtype = keys.device, keys.dtype
        self.front: int = keys.shape[-2]
        self.is_initialized = True
        self.inside = False
        self._untouched = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds the text's next keys [B, Hkv, L, D] and values; returns all with the prefix.

        Raises:
            RuntimeError: no forward with this prefix is running.
        """
        if not self.inside:
            raise RuntimeError(
                "cache: holds the prefix of a use_prefix block, which is closed: go on with it in "
                "a block with this prefix, or start with a new cache"
            )
        assert self.keys is not None
        assert self.values is not None
        keys = torch.cat([self.keys.to(key_states.dtype), key_states], dim=-2)
        values = torch.cat([self.values.to(value_states.dtype), value_states], dim=-2)
        if self._untouched and self.pads is not None:
            keys = _reordered(keys, self.pads, self.front)
            values = _reordered(values, self.pads, self.front)
        self._untouched = False
        self.keys, self.values = keys, values
        return keys, values

    def get_seq_length(self) -> int:
        """How many tokens of the text are in the cache; in the forward the prefix counts too."""
        if not self.is_initialized or self.keys is None:
            return 0
        return int(self.keys.shape[-2]) - (0 if self.inside else self.front)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the text's last tokens.

        Args:
            tokens_to_remove: their number, negative. A positive number is the number of tokens to
                keep, as in older releases of transformers.
        """
        length = self.get_seq_length()
        keep = length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if self.keys is None or self.values is None or keep >= length:
            return
        end = self.front + max(keep, 0)
        self.keys, self.values = self.keys[..., :end, :], self.values[..., :end, :]

    def reset(self) -> None:
        """Forgets the text and the prefix. The next forward puts the prefix in again."""
        self.keys = self.values = self.pads = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keeps the rows that beam search continues."""
        super().reorder_cache(beam_idx)
        if self.pads is not None:
            self.pads = self.pads[beam_idx.to(self.pads.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        super().batch_repeat_interleave(repeats)
        if self.pads is not None:
            self.pads = self.pads.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        super().batch_select_indices(indices)
        if self.pads is not None:
            self.pads = self.pads[indices]


def own_cache(cache: Any) -> Any:
    """The cache of a decoder's own text, which may be a part of an encoder-decoder's cache."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def new_cache(*, cross: bool) -> Cache:
    """An empty cache. With cross, for a decoder that sees an encoder's output."""
    return EncoderDecoderCache(DynamicCache(), DynamicCache()) if cross else DynamicCache()


def expanded_layers(cache: Any) -> list[ExpandedLayer]:
    """The layers of a cache that hold a prefix."""
    layers = getattr(own_cache(cache), "layers", ())
    return [layer for layer in layers if isinstance(layer, ExpandedLayer)]


def check_cache(cache: Any, active: ActivePrefix) -> bool:
    """Whether a cache is empty, so that the prefix can be put into it.

    Raises:
        NotImplementedError: this kind of cache cannot hide a prefix.
        ValueError: it contains a text that began without this prefix.
    """
    own = own_cache(cache)
    fits = isinstance(own, DynamicCache) and not getattr(own, "offloading", False)
    if not fits or any(type(x) not in (DynamicLayer, ExpandedLayer) for x in own.layers):
        kinds = sorted({type(layer).__name__ for layer in getattr(own, "layers", ())})
        raise NotImplementedError(
            f"cache: got {type(own).__name__} of {kinds}, takes a DynamicCache, neither offloaded "
            "nor with windows: with fallback='expand' the prefix is kept in the cache"
        )
    if own.get_seq_length() == 0:
        return True
    held = expanded_layers(own)
    if not held or not _same(held[0].active, active):
        what = "another prefix" if held else "no prefix"
        raise ValueError(
            f"cache: got one that holds a text behind {what}, takes an empty one or one of this "
            "prefix: with fallback='expand' the prefix is kept in the cache"
        )
    return False


def fill_cache(cache: Any, active: ActivePrefix, rows: int, pads: Tensor | None) -> None:
    """Puts a prefix into an empty cache, a copy for each row; gradients flow to the prefix."""
    kv = active.kv
    assert kv is not None
    own_cache(cache).layers = [
        ExpandedLayer(_of_rows(key, active, rows), _of_rows(value, active, rows), pads, active)
        for key, value in zip(kv.keys, kv.values, strict=True)
    ]


def front_mask(active: ActivePrefix, rows: int) -> Tensor:
    """[B, F] bool: which slots in front of each row's text hold its prefix: the last ones."""
    kv = active.kv
    assert kv is not None
    if isinstance(kv, PrefixKV):
        return torch.ones(rows, kv.num_virtual_tokens, dtype=torch.bool, device=kv.device)
    lengths = _lengths(active)
    F = kv.longest[0]
    return torch.arange(F, device=lengths.device) >= F - lengths


def reordered_mask(mask: Tensor, pads: Tensor, front: int) -> Tensor:
    """A mask [B, F + L], put into the order of the slots in a layer with these pads."""
    return mask.gather(1, _order(pads, front, mask.shape[1]))


def _reordered(x: Tensor, pads: Tensor, front: int) -> Tensor:
    """Turns [prefix, pads, text] into [pads, prefix, text]; [B, Hkv, F + L, D]."""
    order = _order(pads, front, x.shape[2])[:, None, :, None]
    return x.gather(2, order.expand(-1, x.shape[1], -1, x.shape[3]))


def _order(pads: Tensor, front: int, total: int) -> Tensor:
    """[B, F + L]: for each slot of a row, its place in [prefix, text]."""
    slot, pads = torch.arange(total, device=pads.device)[None], pads[:, None]
    behind = torch.where(slot < pads + front, slot - pads, slot)
    return torch.where(slot < pads, slot + front, behind)


def _of_rows(x: Tensor, active: ActivePrefix, rows: int) -> Tensor:
    """[B, Hkv, F, D]: a copy for each row of the keys or values [Hkv, P, D] of its prefix."""
    if isinstance(active.kv, PrefixKV):
        return x.expand(rows, -1, -1, -1)
    kv, index = active.kv, active.prefix_index
    assert isinstance(kv, PackedPrefixKV)
    assert index is not None
    lengths = kv.prefix_lengths[0].long()
    ends = torch.cat([lengths.cumsum(0), lengths.new_zeros(1)])[index.long()]
    # in front of a shorter prefix any token will do: the mask leaves it out
    tokens = ends[:, None] - torch.arange(kv.longest[0], 0, -1, device=ends.device)
    return x[:, tokens.clamp(min=0)].transpose(0, 1)


def _lengths(active: ActivePrefix) -> Tensor:
    """[B, 1]: the length of each row's prefix."""
    assert isinstance(active.kv, PackedPrefixKV)
    assert active.prefix_index is not None
    lengths = active.kv.prefix_lengths[0]
    return torch.cat([lengths, lengths.new_zeros(1)])[active.prefix_index.long()][:, None]


def _same(one: ActivePrefix, other: ActivePrefix) -> bool:
    """Whether two calls have the same prefixes, row by row."""
    a, b = one.kv, other.kv
    if a is None or b is None or type(a) is not type(b) or one.prefix_ids != other.prefix_ids:
        return False
    if a is b:
        return True
    pairs = [*zip(a.keys, b.keys, strict=True), *zip(a.values, b.values, strict=True)]
    if isinstance(a, PackedPrefixKV) and isinstance(b, PackedPrefixKV):
        pairs.append((a.prefix_lengths[0], b.prefix_lengths[0]))
    return all(x.device == y.device and torch.equal(x, y) for x, y in pairs)
