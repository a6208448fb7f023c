"""Encoders whose parameters are the keys and values themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.arguments import methods_refuse_unknown_arguments
from fastprefix.encoders.encoder import Encoder
from fastprefix.kv import LayerShape


@methods_refuse_unknown_arguments
class DirectEncoder(Encoder):
    """One trainable number for each number of the prefix (Li and Liang 2021, "no reparam").

    Args:
        shapes: see :class:`Encoder`.
        lengths: see :class:`Encoder`.
        init_std: the standard deviation of the random start.
        options: the other arguments of :class:`Encoder`.

    Attributes:
        embedding: the trained tokens, [P, width] in the layout of :mod:`fastprefix.kv.flat`. If
            layers have different lengths, it is a vector of the used numbers only, row after row.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        lengths: int | Sequence[int],
        *,
        init_std: float = 0.02,
        **options: Any,
    ) -> None:
        super().__init__(shapes, lengths, **options)
        self.init_std = init_std
        trained = self.trained
        size = (
            (trained.num_virtual_tokens, trained.width)
            if trained.is_even
            else (trained.num_numbers,)
        )
        self.embedding = nn.Parameter(init_std * torch.randn(size))
        if self.frozen is not None:
            self.frozen.normal_(0.0, init_std)

    def compute(self) -> Tensor:
        """See :meth:`Encoder.compute`."""
        if self.trained.is_even:
            return self.embedding
        used = self.trained.used().to(self.embedding.device)
        return self.embedding.new_zeros(used.shape).masked_scatter(used, self.embedding)

    def _start_from(self, flat: Tensor) -> None:
        if not self.trained.is_even:
            flat = flat[self.trained.used().to(flat.device)]
        self.embedding.copy_(flat)

    def _carry(self, num_tokens: int) -> Callable[[Tensor], Tensor]:
        old = self.trained
        if old.is_even:
            return super()._carry(num_tokens)
        new = old.longer(num_tokens).used()
        is_old = torch.zeros_like(new)
        is_old[: old.num_virtual_tokens] = old.used()
        is_old = is_old[new]  # for each number of the new embedding, whether the old one has it

        def carry(x: Tensor) -> Tensor:
            return x.new_zeros(is_old.shape).masked_scatter(is_old.to(x.device), x)

        return carry

    def _new_numbers(self, count: int) -> Tensor:
        return self.init_std * torch.randn(count)

    def _missing_tokens(self, embedding: Tensor) -> int:
        if self.trained.is_even:
            return super()._missing_tokens(embedding)
        return (embedding.numel() - self.trained.num_numbers) // self.trained.width


@methods_refuse_unknown_arguments
class SharedEncoder(Encoder):
    """One block of trainable keys and values that all layers use.

    Args:
        shapes: see :class:`Encoder`. All layers with a prefix must have the same shape.
        lengths: see :class:`Encoder`. Each layer uses that many leading tokens of the block.
        init_std: the standard deviation of the random start.
        options: the other arguments of :class:`Encoder`.

    Attributes:
        embedding: the trained tokens, [P, width of one layer].

    Raises:
        ValueError: layers with a prefix have different shapes.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        lengths: int | Sequence[int],
        *,
        init_std: float = 0.02,
        **options: Any,
    ) -> None:
        super().__init__(shapes, lengths, **options)
        self.init_std = init_std
        if len({self.layout.shapes[slot] for slot in self.layout.slots}) > 1:
            raise ValueError(
                f"shapes: got {sorted(set(shapes), key=str)}; layers that share one block must "
                "have one shape"
            )
        P, width = self.trained.num_virtual_tokens, self.layout.widths[0]
        self.embedding = nn.Parameter(init_std * torch.randn(P, width))
        if self.frozen is not None:
            frozen = init_std * torch.randn(self.num_frozen_tokens, width)
            self.frozen.copy_(self._repeat(frozen))

    def compute(self) -> Tensor:
        """See :meth:`Encoder.compute`."""
        return self._repeat(self.embedding)

    def _repeat(self, block: Tensor) -> Tensor:
        return block.repeat(1, len(self.layout.slots))

    def _start_from(self, flat: Tensor) -> None:
        """Starts from the mean over the layers, because one block cannot differ between them.

        The mean of a token is over the layers that use it. It is the nearest block to all of them.
        """
        trained = self.trained
        layers = flat.unflatten(1, (len(trained.slots), -1))
        used = trained.used().to(flat.device).unflatten(1, layers.shape[1:])
        longest = [trained.lengths[slot] for slot in trained.slots].index(flat.shape[0])
        one = layers[:, longest]  # so that equal layers give exactly their block
        rest = (layers - one[:, None]).masked_fill(~used, 0.0)
        self.embedding.copy_(one + rest.sum(1) / used.sum(1))

    def _new_numbers(self, count: int) -> Tensor:
        return self.init_std * torch.randn(count)
