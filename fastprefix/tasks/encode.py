"""How a text begins as token ids, in training and in generation, and the padding of batches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from fastprefix.arguments import methods_refuse_unknown_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # cross entropy in torch and transformers skips this label

Encoded = dict[str, list[int]]


def encode_start(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a text that more text will follow.

    The ids begin with the tokenizer's beginning-of-sequence token if it puts one by itself. Only
    the start: some tokenizers would also end the text.
    """
    return encode_starts([text], tokenizer)[0]


def encode_starts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return what :func:`encode_start` returns for each of the texts; many at once are faster."""
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    first = [tokenizer.bos_token_id] if _puts_bos(tokenizer) else []
    return [[*first, *ids] for ids in rows]


def prompt_template(tokenizer: PreTrainedTokenizerBase, question: str = "\n") -> str:
    """Return a chat template that writes a user's turn as training wrote what a model reads.

    Args:
        tokenizer: the model's. A turn with an example's source gets the ids of
            ``Encoding.prompt`` for that example.
        question: of the task.
    """
    start = "{{ bos_token }}" if _puts_bos(tokenizer) else ""
    return start + "{{ messages[0]['content'] + " + json.dumps(question) + " }}"


def _puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("")["input_ids"][:1] == [bos]


@methods_refuse_unknown_arguments
class Collator:
    """Pads items of causal language models to the longest of the batch.

    Calling it with B items returns ``input_ids``, ``attention_mask`` and ``labels``, each a
    ``torch.long`` tensor of shape ``(B, L)``, padded with the padding token (the end-of-sequence
    token where there is none), 0 and -100. Items without labels, as for generation, give a batch
    without labels.

    Args:
        tokenizer: gives the padding token.
        padding_side: "right" for training, "left" for generation.

    Raises:
        ValueError: ``padding_side`` is neither, or the tokenizer has no token to pad with; when
            called, no items.
        KeyError: when called, an item lacks a key that the first one has.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        padding_side: Literal["right", "left"] = "right",
    ) -> None:
        if padding_side not in ("right", "left"):
            raise ValueError(f'padding_side is {padding_side!r}; it must be "right" or "left"')
        # Safe even if it is the end-of-sequence token: masks and labels do not depend on ids.
        pad = tokenizer.pad_token_id
        pad = tokenizer.eos_token_id if pad is None else pad
        if pad is None:
            raise ValueError("the tokenizer has neither a padding nor an end-of-sequence token")
        self.padding_side = padding_side
        self._fill = {"input_ids": int(pad), "attention_mask": 0, "labels": IGNORED}

    def __call__(self, items: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Return one padded batch."""
        if not items:
            raise ValueError("there are no items to make a batch of")
        width = max(len(item["input_ids"]) for item in items)
        return {
            key: torch.tensor([self._pad(item[key], width, fill) for item in items])
            for key, fill in self._fill.items()
            if key in items[0]
        }

    def _pad(self, values: Sequence[int], width: int, fill: int) -> list[int]:
        padding = [fill] * (width - len(values))
        return [*values, *padding] if self.padding_side == "right" else [*padding, *values]
