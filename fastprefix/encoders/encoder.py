"""What all encoders share: a prefix that is computed, with some of its tokens frozen."""

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
    """Makes a prefix out of trainable parameters; called, it gives a :class:`PrefixKV`.

    A subclass has a parameter ``embedding`` with a share of every trained token, and implements
    the abstract methods.

    Args:
        shapes: the attention layers' key and value shapes.
        lengths: virtual tokens of every layer, or of each; a layer of length 0 has no prefix, and
            no parameters.
        position_offset: position of the first token behind the prefix; P if None.
        dropout: probability of zeroing a number of the trained tokens in training.
        num_frozen_tokens: how many leading tokens are not trained. They are a buffer, which
            :meth:`start_from` fills; no optimizer knows of it.

    Attributes:
        layout: of the whole prefix.
        trained: layout of the tokens behind the frozen ones.
        frozen: [num_frozen_tokens, width], or None.
        trained_slots: layers that get gradients; None for all. With a network the others still
            move with what they share.
        reweighting: biases or gates of the query heads, beside the tokens; None at first.
        any_length: whether ``load_state_dict`` takes a state of another length, and the encoder
            that length.

    Raises:
        ValueError: lengths do not fit the shapes, or num_frozen_tokens leaves a layer nothing.
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
        """The trained tokens, [P - num_frozen_tokens, width], with gradients."""

    def forward(self) -> PrefixKV:
        """The prefix, with gradients; dropout applies in training."""
        flat = self.dropout(self.compute())
        if self.frozen is not None:
            flat = torch.cat([self.frozen, flat])
        kv = self.layout.to_prefix_kv(flat, self.position_offset)
        weights = None if self.reweighting is None else self.reweighting()
        if self.trained_slots is None:
            return replace(kv, reweighting=weights)
        if weights is not None:
            weights = replace(weights, heads=self._trained_alone(weights.heads))
        keys, values = self._trained_alone(kv.keys), self._trained_alone(kv.values)
        return replace(kv, keys=keys, values=values, reweighting=weights)

    def _trained_alone(self, layers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        slots = self.trained_slots or ()
        return tuple(x if slot in slots else x.detach() for slot, x in enumerate(layers))

    def start_from_prefix(self, kv: PrefixKV) -> None:
        """Starts from a whole prefix, what reweights its heads included.

        Raises:
            ValueError: it has other layers or lengths, or other heads are reweighted.
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
        """Starts from given numbers [P, width], in the layout's order.

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
        """Adds trained tokens at the end of every prefix; the present ones stay as they are.

        The new tokens start as those of a new encoder. ``embedding`` becomes another parameter,
        of which an optimizer must be told.

        Returns:
            What becomes of a tensor that an optimizer keeps for ``embedding``: the same numbers
            for the present tokens, zeros for the new ones.

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
        """:meth:`start_from` for the trained tokens; zeros beyond a layer's length."""

    def _carry(self, num_tokens: int) -> Callable[[Tensor], Tensor]:
        """See :meth:`grow`; changes nothing yet. Here for an embedding with one row a token."""
        return lambda x: torch.cat([x, x.new_zeros(num_tokens, *x.shape[1:])])

    @abstractmethod
    def _new_numbers(self, count: int) -> Tensor:
        """Numbers of ``embedding`` for new tokens, drawn as for a new encoder."""

    def _set_layout(self, layout: FlatLayout) -> None:
        """Takes another length; ``embedding`` follows at once."""
        self.layout = layout

    def _missing_tokens(self, embedding: Tensor) -> int:
        """How many tokens another embedding has more than this encoder's."""
        return embedding.shape[0] - self.embedding.shape[0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}embedding")
        if self.any_length and saved is not None and saved.shape != self.embedding.shape:
            self._set_layout(self.layout.longer(self._missing_tokens(saved)))
            new = self.embedding.new_empty(saved.shape)
            self.embedding = nn.Parameter(new, self.embedding.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args)
