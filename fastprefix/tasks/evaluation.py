"""How a model does on records: its loss on their descriptions, and what it generates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastprefix.arguments import refuses_unknown_arguments
from fastprefix.tasks.descriptions import Record
from fastprefix.tasks.encode import IGNORED, Collator, DescriptionDataset, Encoded, encode_prompt


@refuses_unknown_arguments
@torch.no_grad()
def target_loss(
    model: Any, items: DescriptionDataset, collator: Collator, batch_size: int = 16
) -> float:
    """Mean cross entropy in nats per target token, over all items.

    Args:
        model: takes input_ids, attention_mask and labels, and returns an output with ``loss``.
        items: encoded records.
        collator: makes batches of them.
        batch_size: items of a forward pass; does not change the result.

    Raises:
        ValueError: no items.
    """
    if len(items) == 0:
        raise ValueError("items: got none, takes at least one")
    total, tokens = 0.0, 0
    for start in range(0, len(items), batch_size):
        chosen = [items[i] for i in range(start, min(start + batch_size, len(items)))]
        batch = collator(chosen)
        # no token precedes the first one, so its label does not count
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(model(**batch).loss) * count
        tokens += count
    return total / tokens


@refuses_unknown_arguments
@torch.no_grad()
def describe(
    model: Any, tokenizer: Any, records: Sequence[Record], max_new_tokens: int = 60
) -> list[str]:
    """Greedy descriptions of records, generated in one left-padded batch; first line of each.

    Args:
        model: has ``generate()``.
        tokenizer: its tokenizer.
        records: what to describe.
        max_new_tokens: where to stop a description that does not end by itself.
    """
    prompts: list[Encoded] = []
    for record in records:
        ids = encode_prompt(record, tokenizer)
        prompts.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
    batch = Collator(tokenizer, padding_side="left")(prompts)
    ids = model.generate(
        **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip().split("\n")[0] for text in texts]
