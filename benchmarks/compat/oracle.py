"""What is right: plain transformers, one unpadded row at a time, with the prefix concatenated.

Nothing here knows of fastprefix or PEFT. Rows are run alone and whole, without padding and without
a cache of the text, so that nothing is left that could be masked, placed or cut wrongly:

- A model whose attention goes through transformers' AttentionInterface is run with
  :func:`concatenating_attention`, which puts the prefix in front of each layer's keys and values.
- Any other model, and an encoder-decoder judged by PEFT's rules, gets the prefix as a cache that
  transformers takes for the start of the sequence.

Greedy decoding, sampling and beam search are loops over such forwards.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask

from compat.architectures import Architecture, Row

NAME = "compat_concatenated"
Prefix = list[tuple[Tensor, Tensor]]  # key and value [Hkv, P, D] of each attention slot


@dataclass(frozen=True)
class Slot:
    """One place where a model attends, in the order of the calls in a forward pass."""

    group: str  # encoder, decoder or cross
    heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True)
class Semantics:
    """What a library documents where "the prefix concatenated" leaves a choice.

    Attributes:
        offset: by how much the text's positions move.
        in_window: whether the prefix slides out of a sliding window like text in front of it.
        cached: whether the prefix is the start of the decoder's own sequence, with its positions,
            as a cache is (encoder-decoders).
    """

    offset: int
    in_window: bool = False
    cached: bool = False


class _Current:
    """What `concatenating_attention` adds, while an oracle runs."""

    shares: dict[nn.Module, list[tuple[Tensor, Tensor]]] | None = None
    recorded: list[tuple[nn.Module, Tensor, Tensor]] | None = None
    in_window = False


def concatenating_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in plain steps over [prefix ; text], every row with a copy of its own."""
    B, Hq, Lq, D = query.shape
    if _Current.recorded is not None:
        _Current.recorded.append((module, key, value))
    P = 0
    if _Current.shares is not None and module in _Current.shares:  # not in one of images
        queue = _Current.shares[module]
        queue.append(queue.pop(0))  # a module that several layers share serves them in turn
        front = [part[None].expand(B, -1, -1, -1) for part in queue[-1]]
        P = front[0].shape[2]
        key, value = torch.cat([front[0], key], 2), torch.cat([front[1], value], 2)
    Lk = key.shape[2] - P
    key, value = (x.repeat_interleave(Hq // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * (D**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    bias = query.new_zeros(1, 1, Lq, Lk) if attention_mask is None else attention_mask
    if position_bias is not None:
        bias = bias + position_bias
    front_bias = query.new_zeros(*bias.shape[:3], P)
    if _Current.in_window and sliding_window is not None:
        places = torch.arange(P)[None] - torch.arange(P + Lk - Lq, P + Lk)[:, None]
        front_bias = front_bias.masked_fill(places <= -sliding_window, float("-inf"))
    scores = scores + torch.cat([front_bias, bias], -1)
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(B, -1, Lq, 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., : P + Lk]
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, concatenating_attention)
AttentionMaskInterface.register(NAME, eager_mask)


def output_of(out: Any) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    return out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state


class Oracle:
    """A bare model that nothing but this class ever touches, and what is right for it.

    Args:
        architecture: of the model.
        model: copied.
    """

    def __init__(self, architecture: Architecture, model: PreTrainedModel) -> None:
        self.architecture = architecture
        self.plain = copy.deepcopy(model)
        self.plain.set_attn_implementation("eager")
        self.model = copy.deepcopy(model)
        if architecture.interface:
            self.model.set_attn_implementation(NAME)
            assert self.model.config._attn_implementation == NAME

    @property
    def defined(self) -> bool:
        """Whether anything says what a prefix means: neither a cache nor the interface does not."""
        return self.architecture.interface or self.architecture.family == "decoder"

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """Where the model attends, and the shapes of keys and values there."""
        row = self.architecture.rows((4,))[0]
        if not self.defined:  # the shapes that any library would try
            config = self.model.config
            size = config.hidden_size // config.num_attention_heads
            slot = Slot("encoder", config.num_attention_heads, size, size)
            return (slot,) * config.num_hidden_layers
        if not self.architecture.interface:
            cache = DynamicCache()
            with torch.no_grad():
                self.model(**row, past_key_values=cache)
            return tuple(
                Slot("decoder", layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
                for layer in cache.layers
            )
        return tuple(
            Slot(self._group(module), key.shape[1], key.shape[3], value.shape[3])
            for module, key, value in self._record(row)
        )

    def prefix(
        self, length: int = 5, seed: int = 0, groups: tuple[str, ...] | None = None
    ) -> Prefix:
        """Random numbers, large enough to matter; 0 tokens for slots outside the groups."""
        generator = torch.Generator().manual_seed(7000 + seed)
        parts = []
        for slot in self.slots:
            P = length if groups is None or slot.group in groups else 0
            parts.append(
                (
                    torch.randn(slot.heads, P, slot.key_size, generator=generator),
                    torch.randn(slot.heads, P, slot.value_size, generator=generator),
                )
            )
        return parts

    def run(
        self,
        row: Row,
        prefix: Prefix | None,
        semantics: Semantics,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Output [B, L, V or hidden] for rows of one length without padding; differentiable."""
        model = self.model if dtype is None else copy.deepcopy(self.model).to(dtype)
        if dtype is not None:
            prefix = prefix and [(key.to(dtype), value.to(dtype)) for key, value in prefix]
            row = {n: x.to(dtype) if x.is_floating_point() else x for n, x in row.items()}
        if prefix is not None and (semantics.cached or not self.architecture.interface):
            return self._run_cached(model, row, prefix)
        extra: dict[str, Any] = {}
        names = inspect.signature(model.forward).parameters
        for name in ("position_ids", "decoder_position_ids"):
            if name in names and self.architecture.interface:
                start = self.architecture.first_position + semantics.offset * (prefix is not None)
                length = row[self.architecture.text].shape[1]
                extra[name] = torch.arange(start, start + length)[None]
        if "use_cache" in names:
            extra["use_cache"] = False
        with self._concatenating(model, prefix, semantics):
            return output_of(model(**row, **extra))

    def outputs(
        self,
        rows: list[Row],
        prefix: Prefix | None,
        semantics: Semantics,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Outputs at all real places of all rows, [places, V or hidden]."""
        return torch.cat([self.run(row, prefix, semantics, dtype)[0] for row in rows])

    @torch.no_grad()
    def next_logits(
        self, row: Row, new: Tensor, prefix: Prefix | None, semantics: Semantics
    ) -> Tensor:
        """Logits [n, V] of the token behind a row and each of its continuations [n, t]."""
        text = self.architecture.text
        full = {name: x.expand(len(new), *x.shape[1:]) for name, x in row.items()}
        full[text] = torch.cat([full[text], new], 1)
        return self.run(full, prefix, semantics)[:, -1].float()

    def greedy(
        self, rows: list[Row], steps: int, prefix: Prefix | None, semantics: Semantics
    ) -> Tensor:
        """New token ids [B, steps]."""
        found = []
        for row in rows:
            new = torch.zeros(1, 0, dtype=torch.long)
            for _ in range(steps):
                logits = self.next_logits(row, new, prefix, semantics)
                new = torch.cat([new, logits.argmax(-1, keepdim=True)], 1)
            found.append(new)
        return torch.cat(found)

    def sample(
        self, rows: list[Row], steps: int, prefix: Prefix | None, semantics: Semantics, seed: int
    ) -> Tensor:
        """New token ids [B, steps]: one draw for the batch a step, as generate() does."""
        torch.manual_seed(seed)
        new = torch.zeros(len(rows), 0, dtype=torch.long)
        for _ in range(steps):
            logits = [
                self.next_logits(row, new[i : i + 1], prefix, semantics)
                for i, row in enumerate(rows)
            ]
            drawn = torch.multinomial(torch.cat(logits).softmax(-1), 1)
            new = torch.cat([new, drawn], 1)
        return new

    def beams(
        self, rows: list[Row], steps: int, prefix: Prefix | None, semantics: Semantics, width: int
    ) -> Tensor:
        """New token ids [B · width, steps], best first: no text ends early, so nothing to rank."""
        found = []
        for row in rows:
            new, score = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1)
            for _ in range(steps):
                logits = self.next_logits(row, new, prefix, semantics)
                total = score[:, None] + logits.log_softmax(-1)
                score, best = total.flatten().topk(width)
                new = torch.cat([new[best // total.shape[1]], best[:, None] % total.shape[1]], 1)
            found.append(new)
        return torch.cat(found)

    def _group(self, module: nn.Module) -> str:
        if self.architecture.family != "encoder-decoder":
            return "encoder" if self.architecture.family != "decoder" else "decoder"
        name = next(name for name, other in self.model.named_modules() if other is module)
        if "EncDecAttention" in name or "encoder_attn" in name:
            return "cross"
        return "encoder" if "encoder." in name else "decoder"

    def _record(self, row: Row) -> list[tuple[nn.Module, Tensor, Tensor]]:
        _Current.recorded = []
        try:
            with torch.no_grad():
                self.run(row, None, Semantics(0))
            return _Current.recorded
        finally:
            _Current.recorded = None

    @cached_property
    def _order(self) -> list[str]:
        """The names of the attention modules in the order of their calls."""
        names = {module: name for name, module in self.model.named_modules()}
        return [names[module] for module, _, _ in self._record(self.architecture.rows((4,))[0])]

    @contextmanager
    def _concatenating(
        self, model: PreTrainedModel, prefix: Prefix | None, semantics: Semantics
    ) -> Iterator[None]:
        if prefix is None:
            yield
            return
        shares: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        for name, part in zip(self._order, prefix, strict=True):
            shares.setdefault(model.get_submodule(name), []).append(part)
        _Current.shares, _Current.in_window = shares, semantics.in_window
        try:
            yield
        finally:
            _Current.shares, _Current.in_window = None, False

    def _run_cached(self, model: PreTrainedModel, row: Row, prefix: Prefix) -> Tensor:
        text = row[self.architecture.text]
        cache: Any = DynamicCache()
        own = [
            part for part, slot in zip(prefix, self.slots, strict=True) if slot.group == "decoder"
        ]
        for layer, (key, value) in enumerate(own):
            B, P = len(text), key.shape[1]
            cache.update(key.expand(B, -1, -1, -1), value.expand(B, -1, -1, -1), layer)
        if self.architecture.family == "encoder-decoder":
            cache = EncoderDecoderCache(cache, DynamicCache())
            mask = {}
        else:
            mask = {"attention_mask": torch.ones(B, P + text.shape[1], dtype=torch.long)}
        return output_of(model(**row, **mask, past_key_values=cache))
