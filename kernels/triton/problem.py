"""One attention problem as every pass sees it: operands, options, tables, kernel arguments."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastprefix.options import Options

from . import launch, ranks, tilings
from .arguments import Keys, Masks, Scores, Sizes, Strides, Tables, stride_unit, strides
from .target import Target, Tile


@dataclass(frozen=True, eq=False)
class Problem:
    """Operands and options of a forward, and what its kernels are told of them.

    An option that is not used is compiled away.

    Attributes:
        query: [B, Hq, Lq, D], last dimension contiguous like that of the next four.
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        prefix_key: [Hkv, P, D].
        prefix_value: [Hkv, P, Dv].
        options: attn_mask is expanded to [B, Hq, Lq, Lk], with strides of 0 where it is broadcast.
        target: where the kernels run.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    options: Options
    target: Target

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, Hq, Hkv, Lq, Lk, P."""
        B, Hq, Lq, _ = self.query.shape
        return B, Hq, self.key.shape[1], Lq, self.key.shape[2], self.prefix_key.shape[1]

    @property
    def keep(self) -> float:
        """Probability that a weight is kept: 1 without dropout."""
        return 1.0 - (self.options.dropout_p or 0.0)

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // max(self.key.shape[1], 1)

    @property
    def sequences(self) -> int:
        """How many sequences: B, or with cu_seqlens M."""
        cu = self.options.cu_seqlens
        return self.query.shape[0] if cu is None else cu.shape[0] - 1

    @property
    def prefixes(self) -> int:
        """How many prefixes lie end to end along P."""
        lengths = self.options.prefix_lengths
        return 1 if lengths is None else lengths.shape[0]

    @functools.cached_property
    def work(self) -> tilings.Work:
        """What the choice of a tile depends on."""
        options, bias = self.options, self.options.prefix_bias
        heavy = (
            options.attn_mask is not None
            or bool(options.dropout_p)
            or (bias is not None and bias.dim() == 3)
        )
        full_tile = options.batch_invariant and options.cu_seqlens is not None
        head_size = max(self.query.shape[-1], self.value.shape[-1])
        return tilings.Work(self.target, head_size, self.query.dtype, heavy, full_tile)

    @functools.cached_property
    def rank(self) -> Tensor | None:
        """[B, Lq] int32: the real tokens before each query, where the window needs them."""
        options = self.options
        if not options.prefix_in_window or options.key_padding_mask is None:
            return None
        shape = self.query.shape[0], self.query.shape[2]
        rank = launch.scratch(shape, self.query.device, torch.int32)
        if rank.numel():
            ranks.ranks_launch(options.key_padding_mask, options.key_lengths, rank).run()
        return rank

    def tile(self, pass_name: str) -> Tile:
        """The tile of one of the passes forward, dq, dkv and dprefix."""
        Lq = self.query.shape[2]
        rows = self.group * Lq if pass_name in ("forward", "dq") else Lq
        length = None
        if pass_name == "dprefix":
            # Only the device knows the lengths of several prefixes, so the tile fits their mean.
            length = triton.cdiv(self.prefix_key.shape[1], self.prefixes or 1)
        return tilings.choose_tile(pass_name, self.work, rows, length)

    def query_tiles(self, table: Tensor | None, rows: int) -> int:
        """How many tiles of packed rows a KV head has: those of a table [tiles, 2], or of B rows.

        Args:
            table: of packed sequences.
            rows: rows per tile.
        """
        if table is not None:
            return table.shape[0]
        return self.query.shape[0] * triton.cdiv(self.group * self.query.shape[2], rows)

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """Run-time arguments by the names that all kernels share."""
        _, _, Hkv, Lq, Lk, P = self.sizes
        options = self.options
        dropped = math.floor(options.dropout_p * 2**32) if options.dropout_p else None
        return {
            "q": self.query,
            "keys": Keys(self.key, self.value, self.prefix_key, self.prefix_value),
            "masks": Masks(
                options.key_padding_mask,
                options.attn_mask,
                options.prefix_bias,
                options.key_lengths,
                options.spans,
            ),
            "sinks": options.sinks,
            "seed": options.dropout_seed if dropped is not None else None,
            "sizes": Sizes(Hkv, Lq, Lk, P),
            "scores": Scores(options.scale, options.softcap),
            "window": options.sliding_window,
            "dropped": dropped,
            "keep": self.keep,
        }

    def tables(self, starts: Tensor | None, tiles: Tensor | None, rank: bool = True) -> Tables:
        """The tables of a launch.

        Args:
            starts: where prefixes begin; left out unless there are several.
            tiles: of packed sequences.
            rank: whether the kernel reads the ranks of queries.
        """
        options = self.options
        return Tables(
            options.prefix_index, None if options.prefix_lengths is None else starts,
            self.rank if rank else None, options.cu_seqlens, tiles,
        )  # fmt: skip

    def strides(
        self, grad_out: Tensor | None = None, sequence: bool = True, prefix: bool = True
    ) -> Strides:
        """The strides of the operands that a kernel reads."""
        options = self.options
        found: dict[str, Tensor | None] = {"q": self.query, "lengths": options.key_lengths}
        if sequence:
            found |= {"k": self.key, "v": self.value}
            found |= {"pad": options.key_padding_mask, "mask": options.attn_mask}
        if prefix:
            found |= {"pk": self.prefix_key, "pv": self.prefix_value, "bias": options.prefix_bias}
        if grad_out is not None:
            found["do"] = grad_out
        return strides(**found)

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments by the names that all kernels share."""
        D, Dv = self.query.shape[-1], self.value.shape[-1]
        options, bias = self.options, self.options.prefix_bias
        # The maximum of the scores as they come from the product, scaled, is the maximum of the
        # scaled ones only if the scale is positive and nothing else happens to a score.
        unchanged = options.softcap is None and options.attn_mask is None and bias is None
        plain = options.scale > 0 and unchanged
        return {
            "GROUP": self.group, "HEAD": D, "HEAD_V": Dv, "CAUSAL": options.is_causal,
            "PRESCALE": not plain,
            "BIAS_DIM": 0 if bias is None else bias.dim(),
            "IN_WINDOW": options.prefix_in_window,
            "PRECISION": tilings.dot_precision(self.query.dtype),
            "BLOCK_D": tilings.block_size(D), "BLOCK_DV": tilings.block_size(Dv),
        }  # fmt: skip

    def launch(
        self,
        kernel: Any,
        programs: int,
        tile: Tile,
        arguments: dict[str, Any],
        constants: dict[str, Any] | None = None,
    ) -> launch.Launch:
        """A launch with the shared arguments that the kernel names, and its own."""
        run_time = self.arguments | arguments
        compile_time = self.constants() | {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
        compile_time |= constants or {}
        if "s" in run_time:
            compile_time["UNIT"] = stride_unit(run_time["s"])
        names = kernel.arg_names
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
    options: Options,
) -> Problem:
    """A checked problem with operands as the kernels read them.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit together.
    """
    query, key, value, prefix_key, prefix_value = launch.rows_contiguous(
        query, key, value, prefix_key, prefix_value
    )
    mask, bias = options.attn_mask, options.prefix_bias
    if mask is not None:
        options = options._replace(attn_mask=mask.expand(*query.shape[:3], key.shape[2]))
    if bias is not None and bias.dim() == 1:
        options = options._replace(prefix_bias=bias.contiguous())
    contiguous = {
        name: tensor.contiguous()
        for name in ("prefix_index", "prefix_lengths", "cu_seqlens", "sinks")
        if (tensor := getattr(options, name)) is not None
    }
    if contiguous:
        options = options._replace(**contiguous)
    target = launch.target_of(query.device)
    problem = Problem(query, key, value, prefix_key, prefix_value, options, target)
    check(problem)
    return problem


def check(problem: Problem) -> None:
    """Raise ValueError for operands that a kernel would read out of bounds or misinterpret.

    Values of tables (lengths, indices) are not read: that would wait for the device.
    """
    _check_operands(problem)
    _check_tensors_of_options(problem)
    _check_options(problem)


def _check_operands(problem: Problem) -> None:
    """Query, key, value and the prefix."""
    query = problem.query
    B, Hq, Hkv, _, Lk, P = problem.sizes
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


def _check_tensors_of_options(problem: Problem) -> None:
    """Shapes, dtypes and devices."""
    query = problem.query
    B, Hq, _, Lq, Lk, P = problem.sizes
    numbers = (query.dtype, torch.float32)
    bias = problem.options.prefix_bias
    bias_shape = (Hq,) if bias is not None and bias.dim() == 1 else (Hq, Lq, P)
    M = problem.sequences
    tensors: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "key_padding_mask": ((B, Lk), (torch.bool,)),
        "key_lengths": ((B,), (torch.int32,)),
        "attn_mask": ((B, Hq, Lq, Lk), (torch.bool, *numbers)),
        "prefix_index": ((M,), (torch.int32,)),
        "prefix_lengths": ((problem.prefixes,), (torch.int32,)),
        "cu_seqlens": ((M + 1,), (torch.int32,)),
        "sinks": ((Hq,), numbers),
        "prefix_bias": (bias_shape, numbers),
        "dropout_seed": ((1,), (torch.int64,)),
        "spans": ((B, 3), (torch.int32,)),
    }
    if problem.options.tables is not None:  # their number is checked where it is known
        tensors["tables"] = ((problem.options.tables.numel(),), (torch.int32,))
    for name, (shape, dtypes) in tensors.items():
        tensor = getattr(problem.options, name)
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


def _check_options(problem: Problem) -> None:
    """What goes together, and numbers."""
    options = problem.options
    B, _, _, Lq, Lk, _ = problem.sizes
    if options.spans is not None and options.key_padding_mask is None:
        raise ValueError("spans: takes key_padding_mask beside it")
    if (options.prefix_index is None) != (options.prefix_lengths is None):
        raise ValueError("prefix_index and prefix_lengths come together")
    if options.cu_seqlens is not None:
        if B != 1 or Lq != Lk:
            raise ValueError(f"cu_seqlens needs B = 1 and Lq = Lk, got {B}, {Lq} and {Lk}")
        if options.key_padding_mask is not None or options.attn_mask is not None:
            raise ValueError("cu_seqlens does not go with key_padding_mask or attn_mask")
        if options.key_lengths is not None:
            raise ValueError("cu_seqlens does not go with key_lengths")
    if options.prefix_in_window and options.sliding_window is None:
        raise ValueError("prefix_in_window needs a sliding_window")
    window, softcap = options.sliding_window, options.softcap
    if window is not None and window < 1:
        raise ValueError(f"sliding_window: got {window}, takes 1 or more")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: got {softcap}, takes a positive number")
    if options.dropout_p and options.dropout_seed is None:
        raise ValueError("dropout_p needs a dropout_seed")
    if options.dropout_p and options.batch_invariant:
        raise ValueError("batch_invariant does not go with dropout_p, which numbers the rows")
