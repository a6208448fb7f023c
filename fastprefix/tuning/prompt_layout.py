"""The order in which a prompt and the text of each row are joined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# The side of a row to which padding is moved; None leaves it where it is.
Padding = Literal["first", "last"] | None


@dataclass(frozen=True)
class PromptLayout:
    """Where each column of the base's input comes from.

    Attributes:
        length: L, the number of the text's tokens, including padding.
        prompt_length: P.
        source: [B, P + L], for each column an index into [prompt ; text]; None if the prompt comes
            first in all rows.
        in_order: whether the real tokens of the text stay in one piece behind the prompt, in the
            columns P to P + L.
    """

    length: int
    prompt_length: int
    source: Tensor | None
    in_order: bool

    def join(self, prompt: Tensor | float, text: Tensor) -> Tensor:
        """Joins values of the prompt's tokens and of the text's; returns [B, P + L, ...].

        Args:
            prompt: [B, P, ...], or one value for all its tokens.
            text: [B, L, ...].
        """
        if not isinstance(prompt, Tensor):
            prompt = text.new_full((text.shape[0], self.prompt_length, *text.shape[2:]), prompt)
        both = torch.cat([prompt, text], dim=1)
        return both if self.source is None else _take(both, self.source)

    def text(self, output: Tensor) -> Tensor:
        """Returns the text's part [B, L, ...] of an output; values for padding are undefined.

        Args:
            output: [B, P + L, ...].
        """
        if self.in_order:
            return output[:, self.prompt_length :]
        return _take(output, self.places())

    def places(self) -> Tensor:
        """Returns [B or 1, L], the column of each token of the text."""
        if self.source is None:
            return torch.arange(self.length)[None] + self.prompt_length
        return self.source.argsort(dim=1)[:, self.prompt_length :]


def lay_out(
    mask: Tensor | None,
    length: int,
    prompt_length: int,
    tokens_before: Tensor | None = None,
    padding: Padding = None,
) -> PromptLayout:
    """Puts the prompt in front of each row's text, or within it.

    Args:
        mask: [B, L], 0 for padding on either side; None if there is no padding.
        length: L.
        prompt_length: P.
        tokens_before: [B], how many of a row's real tokens come before the prompt; 0 if None.
        padding: the side to which padding is moved.
    """
    if mask is None and tokens_before is None:
        return PromptLayout(length, prompt_length, None, True)
    if mask is None:
        assert tokens_before is not None
        mask = torch.ones(len(tokens_before), length, dtype=torch.long, device=tokens_before.device)
    real = mask.bool()
    seen = real.cumsum(1)
    start = (seen < 1).sum(1, keepdim=True)
    if tokens_before is not None:
        before = tokens_before[:, None].to(seen.device)
        start = torch.where(before < 1, start, (seen < before).sum(1, keepdim=True) + 1)
    columns = torch.arange(prompt_length + length, device=mask.device)[None]
    source = torch.where(
        columns < start,
        prompt_length + columns,
        torch.where(columns < start + prompt_length, columns - start, columns),
    )
    if padding is not None:
        joined = PromptLayout(length, prompt_length, source, False).join(1.0, real.float())
        order = joined.argsort(dim=1, stable=True, descending=padding == "last")
        source = source.gather(1, order)
    in_order = tokens_before is None and padding is None
    return PromptLayout(length, prompt_length, source, in_order)


def joined_positions(
    layout: PromptLayout, text: Tensor, real: Tensor | None, tokens_before: Tensor | None
) -> Tensor:
    """Returns position ids [B, P + L] for prompt and text. Tokens behind the prompt move by P.

    Args:
        layout: the layout of the rows.
        text: [B, L], the text's own positions.
        real: [B, L], nonzero for tokens that are not padding; None if there is no padding.
        tokens_before: see :func:`lay_out`.
    """
    B, L = text.shape
    P = layout.prompt_length
    if real is None:
        real = torch.ones_like(text, dtype=torch.bool)
    seen = real.bool().cumsum(1)
    if tokens_before is None:
        tokens_before = seen.new_zeros(B)
    tokens_before = tokens_before[:, None].to(seen.device)
    behind = seen > tokens_before  # padding may have any value
    before = (real.bool() & ~behind).long()
    # the prompt starts behind the last token before it; without one, at the first token's position
    last = text.gather(1, (before * torch.arange(1, L + 1, device=text.device)).argmax(1)[:, None])
    first = text.gather(1, behind.long().argmax(1)[:, None])
    start = torch.where(tokens_before < 1, first, last + 1)
    prompt = start + torch.arange(P, device=text.device)[None]
    return layout.join(prompt, text + P * behind.long())


def _take(rows: Tensor, columns: Tensor) -> Tensor:
    """Takes the entries of rows [B, N, ...] at columns [B or 1, M]."""
    columns = columns.to(rows.device).expand(rows.shape[0], -1)
    if rows.dim() == 2:
        return rows.gather(1, columns)
    shape = (*columns.shape, *rows.shape[2:])
    return rows.gather(1, columns.reshape(*columns.shape, *[1] * (rows.dim() - 2)).expand(shape))
