"""Where a prompt's embeddings lie among those of each row's text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Which side padding goes to; None leaves it where it is.
Padding = Literal["first", "last"] | None


@dataclass(frozen=True)
class Layout:
    """Columns of the rows that the model is fed, by where they come from.

    Attributes:
        length: tokens of the text L, padding included.
        prompt_length: P.
        source: [B, P + L], column by column an index into [prompt ; text]; None where the prompt
            comes first in all rows.
        in_order: whether the real tokens of the text come in one piece behind the prompt, at the
            places P .. P + L.
    """

    length: int
    prompt_length: int
    source: Tensor | None
    in_order: bool

    def join(self, prompt: Tensor | float, text: Tensor) -> Tensor:
        """[B, P + L, ...] from what the prompt has and what the text has.

        Args:
            prompt: [B, P, ...], or one value for all of it.
            text: [B, L, ...].
        """
        if not isinstance(prompt, Tensor):
            prompt = text.new_full((text.shape[0], self.prompt_length, *text.shape[2:]), prompt)
        both = torch.cat([prompt, text], dim=1)
        return both if self.source is None else _take(both, self.source)

    def text(self, output: Tensor) -> Tensor:
        """The text's share [B, L, ...] of an output [B, P + L, ...]; of padding, anything."""
        if self.in_order:
            return output[:, self.prompt_length :]
        return _take(output, self.places())

    def places(self) -> Tensor:
        """[B or 1, L]: the column of each token of the text."""
        if self.source is None:
            return torch.arange(self.length)[None] + self.prompt_length
        return self.source.argsort(dim=1)[:, self.prompt_length :]


def lay_out(
    mask: Tensor | None,
    length: int,
    prompt_length: int,
    after: Tensor | None = None,
    padding: Padding = None,
) -> Layout:
    """Puts the prompt in front of each row's text, or within it.

    Args:
        mask: [B, L], 0 for padding on either side; None for none.
        length: L.
        prompt_length: P.
        after: [B], how many of the row's real tokens come before the prompt; none if None.
        padding: where padding goes.
    """
    if mask is None and after is None:
        return Layout(length, prompt_length, None, True)
    if mask is None:
        assert after is not None
        mask = torch.ones(len(after), length, dtype=torch.long, device=after.device)
    real = mask.bool()
    seen = real.cumsum(1)
    start = (seen < 1).sum(1, keepdim=True)
    if after is not None:
        after = after[:, None].to(seen.device)
        start = torch.where(after < 1, start, (seen < after).sum(1, keepdim=True) + 1)
    columns = torch.arange(prompt_length + length, device=mask.device)[None]
    source = torch.where(
        columns < start,
        prompt_length + columns,
        torch.where(columns < start + prompt_length, columns - start, columns),
    )
    if padding is not None:
        joined = Layout(length, prompt_length, source, False).join(1.0, real.float())
        order = joined.argsort(dim=1, stable=True, descending=padding == "last")
        source = source.gather(1, order)
    return Layout(length, prompt_length, source, after is None and padding is None)


def positions(layout: Layout, text: Tensor, real: Tensor | None, after: Tensor | None) -> Tensor:
    """The text's positions with those of the prompt among them; what follows it moves behind it.

    Args:
        layout: of the rows.
        text: [B, L], the text's own positions.
        real: [B, L], whether a token is one, not padding.
        after: as in :func:`lay_out`.
    """
    B, L = text.shape
    P = layout.prompt_length
    if real is None:
        real = torch.ones_like(text, dtype=torch.bool)
    seen = real.bool().cumsum(1)
    if after is None:
        after = seen.new_zeros(B)
    after = after[:, None].to(seen.device)
    behind = seen > after  # of padding anything will do
    before = (real.bool() & ~behind).long()
    # of the last token before the prompt, or the first of the row
    last = text.gather(1, (before * torch.arange(1, L + 1, device=text.device)).argmax(1)[:, None])
    first = text.gather(1, behind.long().argmax(1)[:, None])
    start = torch.where(after < 1, first, last + 1)
    prompt = start + torch.arange(P, device=text.device)[None]
    return layout.join(prompt, text + P * behind.long())


def _take(rows: Tensor, columns: Tensor) -> Tensor:
    """Rows [B, N, ...] at columns [B or 1, M]."""
    columns = columns.to(rows.device).expand(rows.shape[0], -1)
    if rows.dim() == 2:
        return rows.gather(1, columns)
    shape = (*columns.shape, *rows.shape[2:])
    return rows.gather(1, columns.reshape(*columns.shape, *[1] * (rows.dim() - 2)).expand(shape))
