"""The operator on a GPU against its peers: latency and memory.

    python benchmarks/gpu.py --output benchmarks/results          (or `make gpu`)

Peers, all on keys and values that hold the prefix once per row: SDPA, compiled FlexAttention; and
FlashInfer's cascade, which shares the prefix for decoding, when it is installed. Decoding peers
find their cache expanded before the clock starts; in training the expansion is part of the step.
All sides run in turn, forwards and backwards; medians of CUDA events. A shape is timed only after
a peer gave the same result as we do; a peer that cannot run is left out with its reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from fastprefix import prefix_attention

Side = Callable[[], list[Tensor]]
PAGE = 16  # of FlashInfer's cache, in tokens


@dataclass(frozen=True)
class Shape:
    """One row: what is computed, and on what."""

    work: str  # decode, prefill, or train: forward and backward
    B: int
    Hq: int
    Hkv: int
    P: int
    L: int  # text: in the cache for decode, new tokens otherwise
    D: int = 128
    dtype: str = "bfloat16"

    @property
    def label(self) -> str:
        return f"{self.work} B{self.B} Hq{self.Hq} Hkv{self.Hkv} D{self.D} P{self.P} L{self.L}"


SHAPES = (
    Shape("decode", 1, 32, 8, 1024, 256),
    Shape("decode", 8, 32, 8, 20, 256),
    Shape("decode", 8, 32, 8, 1024, 256),
    Shape("decode", 32, 32, 8, 1024, 256),
    Shape("decode", 32, 32, 8, 8192, 256),
    Shape("decode", 128, 32, 8, 4096, 256),
    Shape("decode", 32, 32, 32, 1024, 256, D=64),
    Shape("prefill", 8, 32, 8, 1024, 512),
    Shape("prefill", 32, 32, 8, 4096, 128),
    Shape("train", 8, 32, 8, 32, 512),
    Shape("train", 8, 32, 8, 1024, 512),
    Shape("train", 32, 32, 8, 4096, 128),
    Shape("train", 8, 12, 12, 64, 1024, D=64),
)


class Problem:
    """The tensors of a shape, and every side's way to the same result."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        s, self.shape = shape, shape
        self.train = s.work == "train"
        dtype = getattr(torch, s.dtype)
        Lq = 1 if s.work == "decode" else s.L

        def random(*size: int) -> Tensor:
            return torch.randn(size, device=device).to(dtype).requires_grad_(self.train)

        self.query = random(s.B, s.Hq, Lq, s.D)
        self.key, self.value = random(s.B, s.Hkv, s.L, s.D), random(s.B, s.Hkv, s.L, s.D)
        self.prefix_key, self.prefix_value = random(s.Hkv, s.P, s.D), random(s.Hkv, s.P, s.D)
        self.inputs = [self.query, self.key, self.value, self.prefix_key, self.prefix_value]
        self.grad_out = torch.randn_like(self.query)

    def ours(self) -> Side:
        """prefix_attention."""

        def run() -> list[Tensor]:
            return self._finish(prefix_attention(*self.inputs, is_causal=True))

        return run

    def sdpa(self) -> Side:
        """PyTorch's SDPA on expanded keys and values, its own choice of kernel."""
        cache, s = self._cache(), self.shape
        mask = None
        if s.work != "decode":
            mask = torch.ones(s.L, s.P + s.L, dtype=torch.bool, device=self.query.device)
            mask = mask.tril(s.P)

        def run() -> list[Tensor]:
            key, value = cache or self._expand()
            out = F.scaled_dot_product_attention(
                self.query, key, value, attn_mask=mask, enable_gqa=s.Hq != s.Hkv
            )
            return self._finish(out)

        return run

    def flex(self) -> Side:
        """Compiled FlexAttention on expanded keys and values, with a block mask."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        cache, s = self._cache(), self.shape
        block_mask = None
        if s.work != "decode":
            block_mask = create_block_mask(
                lambda b, h, i, j: j <= i + s.P, None, None, s.L, s.P + s.L,
                device=self.query.device,
            )  # fmt: skip
        compiled = torch.compile(flex_attention, dynamic=False)

        def run() -> list[Tensor]:
            key, value = cache or self._expand()
            out = compiled(self.query, key, value, block_mask=block_mask, enable_gqa=s.Hq != s.Hkv)
            return self._finish(out)

        return run

    def flashinfer(self) -> Side:
        """FlashInfer's two-level cascade over pages: the prefix's once, then each row's own."""
        s, device = self.shape, self.query.device
        if s.work != "decode":
            raise NotImplementedError("compared for decoding only")
        if s.P % PAGE or s.L % PAGE:
            raise NotImplementedError(f"whole pages of {PAGE} only")
        from flashinfer import MultiLevelCascadeAttentionWrapper

        # [tokens, 2, Hkv, D]: the prefix, then the rows end to end
        shared = torch.stack([self.prefix_key, self.prefix_value]).permute(2, 0, 1, 3)
        own = torch.stack([self.key, self.value]).permute(1, 3, 0, 2, 4).flatten(0, 1)
        tokens = torch.cat([shared, own]).unflatten(0, (-1, PAGE))
        pages = tokens.transpose(1, 2).contiguous()  # [pages, 2, PAGE, Hkv, D]

        def ints(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        first, each = s.P // PAGE, s.L // PAGE
        count = torch.arange(s.B + 1, dtype=torch.int32, device=device)
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
        wrapper = MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
        wrapper.plan(
            [ints(0, s.B), count],
            [ints(0, first), count * each],
            [ints(*range(first)), ints(*range(first, first + s.B * each))],
            [ints(PAGE), ints(PAGE).expand(s.B).contiguous()],
            s.Hq, s.Hkv, s.D, PAGE,
            q_data_type=self.query.dtype,
        )  # fmt: skip
        query = self.query[:, :, 0].contiguous()

        def run() -> list[Tensor]:
            return [wrapper.run(query, pages).unsqueeze(2)]

        return run

    def _cache(self) -> tuple[Tensor, Tensor] | None:
        """Expanded keys and values, made beforehand; None where making them is part of the work."""
        return None if self.train else self._expand()

    def _expand(self) -> tuple[Tensor, Tensor]:
        B = self.shape.B
        return (
            torch.cat([self.prefix_key.expand(B, -1, -1, -1), self.key], dim=2),
            torch.cat([self.prefix_value.expand(B, -1, -1, -1), self.value], dim=2),
        )

    def _finish(self, out: Tensor) -> list[Tensor]:
        if not self.train:
            return [out]
        return [out, *torch.autograd.grad(out, self.inputs, self.grad_out)]


PEERS = ("sdpa", "flex", "flashinfer")


def check(ours: list[Tensor], peer: list[Tensor]) -> None:
    """Raises if the two sides do not compute the same."""
    for got, want in zip(ours, peer, strict=True):
        error = float(((got - want).float().norm() / want.float().norm()).detach())
        if not error < 2e-2:
            raise RuntimeError(f"differs from ours: relative error {error:.2e}")


def medians(sides: dict[str, Side], rounds: int) -> dict[str, float]:
    """Median milliseconds of each side, in turn, in both orders, between CUDA events."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    cold = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for i in range(rounds):
        for name in list(sides) if i % 2 == 0 else reversed(sides):
            cold.zero_()  # no side finds its operands in the L2 cache
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            sides[name]()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(found) for name, found in times.items()}


def extra_memory(side: Side) -> int:
    """Bytes that one call takes at its peak beyond what lay there before, results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = side()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """One row of results."""
    problem = Problem(shape, torch.device("cuda"))
    sides, left_out = {"ours": problem.ours()}, {}
    expected = sides["ours"]()
    for name in PEERS:
        try:
            if name == "flashinfer" and importlib.util.find_spec("flashinfer") is None:
                raise ImportError("not installed")
            side = getattr(problem, name)()
            check(expected, side())
            sides[name] = side
        except Exception as error:  # a peer that fails is a result too
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    del expected
    times = medians(sides, rounds)
    return {
        **asdict(shape), "label": shape.label, "left_out": left_out, "ms": times,
        "ratio": {name: ms / times["ours"] for name, ms in times.items() if name != "ours"},
        "extra_bytes": {name: extra_memory(side) for name, side in sides.items()},
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """Times, ratios and memory."""
    table = Table(title=f"{torch.cuda.get_device_name()}, torch {torch.__version__}: median ms")
    table.add_column("")
    for name in ("ours", *PEERS):
        table.add_column(name, justify="right")
    for row in rows:
        cells = []
        for name in ("ours", *PEERS):
            if name not in row["ms"]:
                cells.append("-")
                continue
            times = "" if name == "ours" else f" ({row['ratio'][name]:.2f}x)"
            cells.append(f"{row['ms'][name]:.3f}{times}\n+{row['extra_bytes'][name] / 1e6:.0f} MB")
        table.add_row(row["label"], *cells)
    table.caption = "in brackets: their time over ours; MB: peak of one call, results included"
    Console(width=110).print(table)
    for row in rows:
        for name, why in row["left_out"].items():
            print(f"{row['label']}: {name} left out: {why}")


def main() -> None:
    """Measures, prints, writes gpu.json; without a device says so and does nothing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--rounds", type=int, default=100)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: needs a CUDA or ROCm device; this machine has none")
        return
    rows = [measure(shape, chosen.rounds) for shape in track(SHAPES, "shapes")]
    show(rows)
    about = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "hip": torch.version.hip, "rounds": chosen.rounds,
    }  # fmt: skip
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / "gpu.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
