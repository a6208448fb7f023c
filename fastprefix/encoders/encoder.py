"""The base of all encoders: frozen tokens, dropout, starting from given numbers, growth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.arguments import methods_refuse_unknown_arguments
from fastprefix.encoders.head_parameters import HeadParameters
from fastprefix.kv import LayerShape, PrefixKV
from fastprefix.kv.flat import FlatLayout


@methods_refuse_unknown_arguments
class Encoder(nn.Module, ABC):
    """A module that computes a :class:`PrefixKV` from trainable parameters when it is called.

    A subclass has a parameter ``embedding``, in which every trained token has numbers of its own,
    and implements the abstract methods.

    Args:
        shapes: the attention layers' key and value shapes.
        lengths: the number of virtual tokens of all layers, or of each layer. A layer of length 0
            has no prefix and no parameters.
        position_offset: position of the first token behind the prefix; P if None.
        dropout: the probability with which each number of the trained tokens is set to 0 in
            training.
        num_frozen_tokens: the number of leading tokens that are not trained. They are a buffer,
            which optimizers do not see. :meth:`start_from` fills it.

    Attributes:
        layout: the layout of the whole prefix.
        trained: the layout of the tokens behind the frozen ones.
        frozen: [num_frozen_tokens, width], or None.
        trained_slots: the layers that get gradients; None for all. If a network computes the
            prefix, the other layers change too, with the weights that all layers share.
        reweighting: biases or gates of the query heads; None at first.
        any_length: whether ``load_state_dict`` accepts a state of another length. The encoder then
            gets that length.

    Raises:
        ValueError: lengths do not fit the shapes, or num_frozen_tokens leaves no trained token in
            a layer.
    """

    embedding: nn.Parameter
    frozen: Tensor | None
    reweighting: HeadParameters | None

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        lengths: int | Sequence[int],
        *,
        position_offset: int | None = None,
        dropout: float = 0.0,
        num_frozen_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.layout = FlatLayout.make(shapes, lengths)
        shortest = min(length for length in self.layout.lengths if length)
        if not 0 <= num_frozen_tokens < shortest:
            raise ValueError(
                f"num_frozen_tokens: got {num_frozen_tokens}, takes 0 or more, and fewer than the "
                f"{shortest} tokens of the shortest prefix of a layer"
            )
        self.num_frozen_tokens = num_frozen_tokens
        self.position_offset = position_offset
        self.dropout = nn.Dropout(dropout)
        self.trained_slots: frozenset[int] | None = None
        self.any_length = False
        frozen = torch.zeros(num_frozen_tokens, self.layout.width) if num_frozen_tokens else None
        self.register_buffer("frozen", frozen)
        self.register_module("reweighting", None)

    @property
    def trained(self) -> FlatLayout:
        """The layout of the tokens behind the frozen ones."""
        return self.layout.longer(-self.num_frozen_tokens)

    @abstractmethod
    def compute(self) -> Tensor:
        """Computes the trained tokens [P - num_frozen_tokens, width], with gradients."""

    def forward(self) -> PrefixKV:
        """Computes the prefix, with gradients; in training, with dropout."""
        flat = self.dropout(self.compute())
        if self.frozen is not None:
            flat = torch.cat([self.frozen, flat])
        kv = self.layout.to_prefix_kv(flat, self.position_offset)
        weights = None if self.reweighting is None else self.reweighting()
        if self.trained_slots is None:
            return replace(kv, reweighting=weights)
        if weights is not None:
            weights = replace(weights, heads=self._detach_untrained(weights.heads))
        keys, values = self._detach_untrained(kv.keys), self._detach_untrained(kv.values)
        return replace(kv, keys=keys, values=values, reweighting=weights)

    def _detach_untrained(self, layers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        slots = self.trained_slots or ()
        return tuple(x if slot in slots else x.detach() for slot, x in enumerate(layers))

    def start_from_prefix(self, kv: PrefixKV) -> None:
        """Starts from a whole prefix, including the biases or gates of its heads.

        Raises:
            ValueError: the prefix has other layers or lengths, or biases or gates of other heads.
        """
        self.start_from(self.layout.to_flat(kv))
        if self.reweighting is not None:
            self.reweighting.start_from(kv.reweighting)
        elif kv.reweighting is not None:
            raise ValueError(
                f"kv: got a prefix with a {kv.reweighting.kind} for each head, takes one without"
            )

    @torch.no_grad()
    def start_from(self, flat: Tensor) -> None:
        """Starts from given numbers [P, width], in the order of the layout.

        Raises:
            ValueError: flat has another shape.
        """
        self.layout.check(flat)
        if self.frozen is not None:
            self.frozen.copy_(flat[: self.num_frozen_tokens])
        used = self.trained.used().to(flat.device)
        self._start_from(flat[self.num_frozen_tokens :].masked_fill(~used, 0.0))

    @torch.no_grad()
    def grow(self, num_tokens: int) -> Callable[[Tensor], Tensor]:
        """Adds trained tokens at the end of every layer's prefix. The present ones do not change.

        The new tokens start like those of a new encoder. ``embedding`` becomes another parameter,
        so the optimizer must be given the new one.

        Returns:
            A function that converts a tensor which the optimizer keeps for ``embedding``. The
            result has the same numbers for the present tokens, and zeros for the new ones.

        Raises:
            ValueError: num_tokens is not positive.
        """
        if num_tokens < 1:
            raise ValueError(f"num_tokens: got {num_tokens}, takes 1 or more")
        carry = self._carry(num_tokens)
        new = carry(self.embedding.detach())
        fresh = carry(torch.ones_like(self.embedding)) == 0
        new[fresh] = self._new_numbers(int(fresh.sum())).to(new)
        self._set_layout(self.layout.longer(num_tokens))
        self.embedding = nn.Parameter(new, self.embedding.requires_grad)
        return carry

    @abstractmethod
    def _start_from(self, flat: Tensor) -> None:
        """Starts from numbers of the trained tokens, which are 0 beyond a layer's length."""

    def _carry(self, num_tokens: int) -> Callable[[Tensor], Tensor]:
        """The function that :meth:`grow` returns; this one is for one row for each token."""
        return lambda x: torch.cat([x, x.new_zeros(num_tokens, *x.shape[1:])])

    @abstractmethod
    def _new_numbers(self, count: int) -> Tensor:
        """Draws numbers of ``embedding`` for new tokens, as for a new encoder."""

    def _set_layout(self, layout: FlatLayout) -> None:
        """Sets another length. The caller replaces ``embedding`` at once."""
        self.layout = layout

    def _missing_tokens(self, embedding: Tensor) -> int:
        """How many more tokens another embedding has than this encoder's."""
        return embedding.shape[0] - self.embedding.shape[0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}embedding")
        if self.any_length and saved is not None and saved.shape != self.embedding.shape:
            self._set_layout(self.layout.longer(self._missing_tokens(saved)))
            new = self.embedding.new_empty(saved.shape)
            self.embedding = nn.Parameter(new, self.embedding.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args)
