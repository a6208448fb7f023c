"""A model over a static cache: key_lengths against a mask over the whole buffer, on this machine.

    python benchmarks/static_cache.py

The operator knows how many keys of the buffer are in use (key_lengths), or it gets a mask
[B, 1, Lq, max_cache_len] instead, as backends get it that cannot do key_lengths. Both sides run in
turn in one process, on the same weights, with a cache each; medians. They are timed only after both
gave the same logits.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from fastprefix import PrefixKV, patch_model, use_prefix
from fastprefix.hf.layer import masks

SIDES = ("mask", "key_lengths")


def build(layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model with the attention of a 1B Llama in each layer, and small other parts."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


@contextlib.contextmanager
def masking(side: str) -> Iterator[None]:
    """Has the layers get what a side is called."""
    if side == "key_lengths":
        yield
        return
    with mock.patch.object(masks, "has_feature", return_value=False):
        yield


class Run:
    """One side: its cache, and the seconds of its forwards by the number of queries."""

    def __init__(self, model: LlamaForCausalLM, side: str, length: int) -> None:
        self.model, self.side, self.length = model, side, length
        self.seconds: dict[int, list[float]] = {}

    def start(self) -> None:
        """An empty cache."""
        self.cache = StaticCache(config=self.model.config, max_cache_len=self.length)

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """The logits of the last token; the call is timed."""
        with masking(self.side):
            began = time.perf_counter()
            logits = self.model(
                ids, attention_mask=mask, past_key_values=self.cache, logits_to_keep=1
            ).logits
            taken = time.perf_counter() - began
        self.seconds.setdefault(ids.shape[1], []).append(taken)
        return logits


def measure(
    B: int, prompt: int, length: int, steps: int, repeats: int, padded: bool, layers: int
) -> dict[tuple[str, int], float]:
    """Median milliseconds of a layer by side and number of queries.

    Args:
        B: rows.
        prompt: queries of the prefill.
        length: max_cache_len.
        steps: single queries after each prefill.
        repeats: of all that.
        padded: whether the first row has padding on the left.
        layers: of the model.
    """
    model = patch_model(build(layers, torch.bfloat16))
    kv = PrefixKV.prefill(model, torch.randint(0, 128, (1, 256)))
    mask = torch.ones(B, length, dtype=torch.long)
    if padded:
        mask[0, : prompt // 4] = 0
    runs = [Run(model, side, length) for side in SIDES]
    with torch.no_grad(), use_prefix(model, kv):
        for repeat in range(repeats + 1):
            ids = torch.randint(0, 128, (B, prompt + steps))
            for run in runs:
                run.start()
                if repeat == 1:
                    run.seconds.clear()  # the first time is a warm-up
            ends = [(0, prompt), *((prompt + n, prompt + n + 1) for n in range(steps))]
            for start, end in ends:
                turn = runs if start % 2 else runs[::-1]
                found = [run.forward(ids[:, start:end], mask[:, :end]) for run in turn]
                torch.testing.assert_close(*found, rtol=5e-2, atol=5e-2)
    return {
        (run.side, queries): 1000 * statistics.median(times) / layers
        for run in runs
        for queries, times in run.seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--max-cache-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2)
    given = parser.parse_args()
    table = Table("work", *(f"{side}, ms a layer" for side in SIDES), "ratio")
    for padded in (False, True):
        found = measure(
            given.rows, given.prompt, given.max_cache_len, given.steps, given.repeats, padded,
            given.layers,
        )  # fmt: skip
        for queries in (given.prompt, 1):
            before, after = (found[side, queries] for side in SIDES)
            work = f"{'prefill' if queries > 1 else 'decode'}{', padded' * padded}"
            table.add_row(work, f"{before:.2f}", f"{after:.2f}", f"{before / after:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
