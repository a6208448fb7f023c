"""One attention problem as every pass sees it: operands, options, tables, kernel arguments."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import launch, tables, tilings


@dataclass(frozen=True, eq=False)
class Problem:
    """Operands and options of a forward, and what its kernels are told of them.

    An option that is None (or False, or 0) is compiled away.

    Attributes:
        query: [B, Hq, Lq, D], last dimension contiguous like that of the next four.
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        prefix_key: [Hkv, P, D].
        prefix_value: [Hkv, P, Dv].
        is_causal: query i sees the sequence keys 0 .. i + Lk - Lq.
        scale: factor on the scores.
        target: where the kernels run.
        key_padding_mask: [B, Lk] bool, True = real token.
        attn_mask: bool (True = attend) or additive, [B, Hq, Lq, Lk] with strides of 0 where it
            is broadcast; for the sequence only.
        prefix_index: [B] int32 (with cu_seqlens [M]), which prefix a row has, -1 for none.
        prefix_lengths: [N] int32, their lengths, end to end along P.
        cu_seqlens: [M + 1] int32, boundaries of the sequences packed along Lq = Lk, B = 1.
        sinks: [Hq], a logit per head that takes weight and gives nothing.
        prefix_bias: [Hq] or [Hq, Lq, P], added to the prefix's scores.
        sliding_window: W, a query sees keys less than W positions away.
        softcap: scores become softcap * tanh(score / softcap) before anything is added.
        prefix_in_window: the window reaches over the prefix too, padding not counted.
        dropout_p: probability that a weight is dropped.
        dropout_seed: [1] int64, the Philox key.
        batch_invariant: a sequence's output has the same bits whatever the others are.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    is_causal: bool
    scale: float
    target: tilings.Target
    key_padding_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    prefix_index: Tensor | None = None
    prefix_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    sinks: Tensor | None = None
    prefix_bias: Tensor | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    prefix_in_window: bool = False
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    batch_invariant: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, Hq, Hkv, Lq, Lk, P."""
        B, Hq, Lq, _ = self.query.shape
        return B, Hq, self.key.shape[1], Lq, self.key.shape[2], self.prefix_key.shape[1]

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // max(self.key.shape[1], 1)

    @property
    def sequences(self) -> int:
        """How many sequences: B, or with cu_seqlens M."""
        return self.query.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @functools.cached_property
    def starts(self) -> Tensor | None:
        """[N + 1] int32: where each prefix begins, and where the last one ends."""
        return None if self.prefix_lengths is None else tables.boundaries(self.prefix_lengths)

    @functools.cached_property
    def rank(self) -> Tensor | None:
        """[B, Lq] int32: the real tokens before each query, where the window needs them."""
        if not self.prefix_in_window or self.key_padding_mask is None:
            return None
        return tables.query_ranks(self.key_padding_mask, self.query.shape[2])

    def query_tiles(self, rows: int, group: int) -> tuple[Tensor | None, int]:
        """The tiles of packed rows: a table [tiles, 2] with cu_seqlens, and how many per KV head.

        Args:
            rows: rows per tile.
            group: heads packed into the rows, 1 for none.
        """
        length = self.query.shape[2]
        if self.cu_seqlens is None:
            return None, self.query.shape[0] * triton.cdiv(group * length, rows)
        table = tables.ragged_tiles(self.cu_seqlens, length, rows, group)
        return table, table.shape[0]

    def arguments(self) -> dict[str, Any]:
        """Run-time arguments by the names that all kernels share.

        Without `starts` and `rank`: those run on the device, for the kernels that name them.
        """
        _, _, Hkv, Lq, Lk, P = self.sizes
        mask, bias = self.attn_mask, self.prefix_bias
        s_mb, s_mh, s_mm, s_mn = (0, 0, 0, 0) if mask is None else mask.stride()
        s_bm, s_bn = (0, 0) if bias is None or bias.dim() == 1 else bias.stride()[1:]
        dropped = math.floor(self.dropout_p * 2**32) if self.dropout_p else None
        return {
            "q": self.query, "k": self.key, "v": self.value,
            "pk": self.prefix_key, "pv": self.prefix_value,
            "pad": self.key_padding_mask, "mask": mask, "bias": bias, "sinks": self.sinks,
            "index": self.prefix_index, "cu": self.cu_seqlens,
            "seed": self.dropout_seed if dropped is not None else None,
            **launch.strides(
                q=self.query, k=self.key, v=self.value, pk=self.prefix_key, pv=self.prefix_value
            ),
            **launch.mask_strides(self.key_padding_mask),
            "s_mb": s_mb, "s_mh": s_mh, "s_mm": s_mm, "s_mn": s_mn,
            "s_bh": 0 if bias is None else bias.stride(0), "s_bm": s_bm, "s_bn": s_bn,
            "Hkv": Hkv, "Lq": Lq, "Lk": Lk, "P": P, "scale": self.scale,
            "window": self.sliding_window, "softcap": self.softcap, "dropped": dropped,
        }  # fmt: skip

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments by the names that all kernels share."""
        D, Dv = self.query.shape[-1], self.value.shape[-1]
        bias = self.prefix_bias
        # The maximum of the scores as they come from the product, scaled, is the maximum of the
        # scaled ones only if the scale is positive and nothing else happens to a score.
        plain = self.scale > 0 and self.softcap is None and self.attn_mask is None and bias is None
        return {
            "GROUP": self.group, "HEAD": D, "HEAD_V": Dv, "CAUSAL": self.is_causal,
            "PRESCALE": not plain,
            "BIAS_DIM": 0 if bias is None else bias.dim(),
            "IN_WINDOW": self.prefix_in_window,
            "PRECISION": tilings.dot_precision(self.query.dtype),
            "BLOCK_D": tilings.block_size(D), "BLOCK_DV": tilings.block_size(Dv),
        }  # fmt: skip

    def launch(
        self,
        kernel: Any,
        programs: int,
        tile: tilings.Tile,
        arguments: dict[str, Any],
        constants: dict[str, Any] | None = None,
    ) -> launch.Launch:
        """A launch with the shared arguments that the kernel names, and its own."""
        run_time = self.arguments() | arguments
        compile_time = self.constants() | {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
        compile_time |= constants or {}
        names = kernel.arg_names
        for name in ("starts", "rank"):
            if name in names and name not in run_time:
                run_time[name] = getattr(self, name)
        return launch.Launch(
            kernel,
            (programs,),
            {name: run_time[name] for name in names if name in run_time},
            {name: compile_time[name] for name in names if name in compile_time},
            tile,
        )


def make_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sinks: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    **options: Any,
) -> Problem:
    """A checked problem with operands as the kernels read them; options as in :class:`Problem`.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit together.
    """
    query, key, value, prefix_key, prefix_value = launch.rows_contiguous(
        query, key, value, prefix_key, prefix_value
    )
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    if prefix_bias is not None and prefix_bias.dim() == 1:
        prefix_bias = prefix_bias.contiguous()
    problem = Problem(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        target=launch.target_of(query.device),
        attn_mask=attn_mask,
        prefix_index=None if prefix_index is None else prefix_index.contiguous(),
        prefix_lengths=None if prefix_lengths is None else prefix_lengths.contiguous(),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
        sinks=None if sinks is None else sinks.contiguous(),
        prefix_bias=prefix_bias,
        **options,
    )
    check(problem)
    return problem


def check(problem: Problem) -> None:
    """Raise ValueError for operands that a kernel would read out of bounds or misinterpret.

    Values of tables (lengths, indices) are not read: that would wait for the device.
    """
    query = problem.query
    B, Hq, Hkv, Lq, Lk, P = problem.sizes
    D, Dv = query.shape[-1], problem.value.shape[-1]
    operands = {
        "key": (problem.key, (B, Hkv, Lk, D)),
        "value": (problem.value, (B, Hkv, Lk, Dv)),
        "prefix_key": (problem.prefix_key, (Hkv, P, D)),
        "prefix_value": (problem.prefix_value, (Hkv, P, Dv)),
    }
    for name, (tensor, shape) in operands.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, "
                f"the query is {query.dtype} on {query.device}"
            )
    if query.dtype not in tilings.DTYPES:
        raise ValueError(f"the kernels support {tilings.DTYPES}, not {query.dtype}")
    if not (1 <= D <= tilings.MAX_HEAD_SIZE and 1 <= Dv <= tilings.MAX_HEAD_SIZE):
        raise ValueError(f"head sizes {D} and {Dv} are outside 1 .. {tilings.MAX_HEAD_SIZE}")
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"{Hq} query heads are not a multiple of {Hkv} key heads")

    numbers = (query.dtype, torch.float32)
    bias = problem.prefix_bias
    bias_shape = (Hq,) if bias is not None and bias.dim() == 1 else (Hq, Lq, P)
    M = problem.sequences
    prefixes = 0 if problem.prefix_lengths is None else problem.prefix_lengths.shape[0]
    tensors: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "key_padding_mask": ((B, Lk), (torch.bool,)),
        "attn_mask": ((B, Hq, Lq, Lk), (torch.bool, *numbers)),
        "prefix_index": ((M,), (torch.int32,)),
        "prefix_lengths": ((prefixes,), (torch.int32,)),
        "cu_seqlens": ((M + 1,), (torch.int32,)),
        "sinks": ((Hq,), numbers),
        "prefix_bias": (bias_shape, numbers),
        "dropout_seed": ((1,), (torch.int64,)),
    }
    for name, (shape, dtypes) in tensors.items():
        tensor = getattr(problem, name)
        if tensor is not None and (
            tuple(tensor.shape) != shape
            or tensor.dtype not in dtypes
            or tensor.device != query.device
        ):
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"{name} must be {allowed} {list(shape)} on {query.device}, got {tensor.dtype} "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )
    if (problem.prefix_index is None) != (problem.prefix_lengths is None):
        raise ValueError("prefix_index and prefix_lengths come together")
    if problem.cu_seqlens is not None:
        if B != 1 or Lq != Lk:
            raise ValueError(f"cu_seqlens needs B = 1 and Lq = Lk, got {B}, {Lq} and {Lk}")
        if problem.key_padding_mask is not None or problem.attn_mask is not None:
            raise ValueError("cu_seqlens does not go with key_padding_mask or attn_mask")
    if problem.prefix_in_window and problem.sliding_window is None:
        raise ValueError("prefix_in_window needs a sliding_window")
    window, softcap = problem.sliding_window, problem.softcap
    if window is not None and window < 1:
        raise ValueError(f"sliding_window: got {window}, takes 1 or more")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: got {softcap}, takes a positive number")
    if problem.dropout_p and problem.dropout_seed is None:
        raise ValueError("dropout_p needs a dropout_seed")
    if problem.dropout_p and problem.batch_invariant:
        raise ValueError("batch_invariant does not go with dropout_p, which numbers the rows")
