"""Records as token ids for causal language models, and the collator that makes batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch.utils.data import Dataset

from fastprefix.arguments import methods_refuse_unknown_arguments, refuses_unknown_arguments
from fastprefix.tasks.descriptions import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # cross entropy in torch and transformers skips this label

Encoded = dict[str, list[int]]


def encode_start(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a text that more text will follow.

    The ids begin with the tokenizer's beginning-of-sequence token if it puts one by itself. Only
    the start: some tokenizers would also end the text.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids] if _puts_bos(tokenizer) else list(ids)


@refuses_unknown_arguments
def encode_prompt(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of the prompt and its line break: what generation starts from.

    They are those of :func:`encode_start`.
    """
    return encode_start(record.prompt + "\n", tokenizer)


def prompt_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a chat template that writes a user's turn as training wrote a prompt.

    A turn with the text of ``record.prompt`` gets the ids of ``encode_prompt``.
    """
    start = "{{ bos_token }}" if _puts_bos(tokenizer) else ""
    return start + "{{ messages[0]['content'] + '\\n' }}"


def _puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("")["input_ids"][:1] == [bos]


@refuses_unknown_arguments
def encode_record(record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Return ``input_ids``, ``attention_mask`` and ``labels`` of one record, of equal length.

    The text is the prompt, a line break, the description and the end-of-sequence token; the
    labels of the prompt and its line break are -100. Prompt and description are tokenised apart,
    so that the prompt has the same ids in training as in generation.

    Raises:
        ValueError: the record is longer than ``max_length`` tokens (nothing is ever cut off), or
            the tokenizer has no end-of-sequence token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no end-of-sequence token, which ends each target")
    prompt = encode_prompt(record, tokenizer)
    target = [*tokenizer(record.description, add_special_tokens=False)["input_ids"], eos]
    length = len(prompt) + len(target)
    if length > max_length:
        raise ValueError(
            f"the record '{record.prompt}' is {length} tokens long, "
            f"more than max_length={max_length}"
        )
    return {
        "input_ids": prompt + target,
        "attention_mask": [1] * length,
        "labels": [IGNORED] * len(prompt) + target,
    }


@methods_refuse_unknown_arguments
class DescriptionDataset(Dataset[Encoded]):
    """Records encoded once, for ``transformers.Trainer`` or a ``DataLoader`` with ``Collator``.

    Items are as ``encode_record`` returns them. Raises what it raises.
    """

    def __init__(
        self, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        self._items = [encode_record(record, tokenizer, max_length) for record in records]

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._items)

    def __getitem__(self, index: int) -> Encoded:
        """Return the ids of one record."""
        return self._items[index]


@methods_refuse_unknown_arguments
class Collator:
    """Pads encoded records to the longest of the batch.

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
