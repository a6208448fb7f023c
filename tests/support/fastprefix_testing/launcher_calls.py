"""Calls of the kernels' launchers, with tensors of any layout and options in any combination."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprefix import prefix_attention
from fastprefix.options import Options

FIVE = ("query", "key", "value", "prefix_key", "prefix_value")


@dataclass(frozen=True)
class Call:
    """A call of the launchers: query to prefix_value, then grad_out, out and lse; and options."""

    tensors: dict[str, Tensor]
    options: Options

    @property
    def five(self) -> tuple[Tensor, ...]:
        return tuple(self.tensors[name] for name in FIVE)

    def again(self) -> Call:
        """The same with other tensors."""
        options: dict[str, Any] = {
            n: another(x) for n, x in self.options._asdict().items() if is_tensor(x)
        }
        tensors = {name: another(x) for name, x in self.tensors.items()}
        return Call(tensors, self.options._replace(**options))

    def addresses(self) -> dict[int, str]:
        """The names of the tensors at these addresses."""
        named = {**self.options._asdict(), **self.tensors}
        return {x.data_ptr(): name for name, x in named.items() if is_tensor(x) and x.numel()}


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def another(x: Tensor) -> Tensor:
    """A tensor of the same shape, strides, offset in its storage, and values."""
    storage = torch.zeros(x.untyped_storage().nbytes(), dtype=torch.uint8)
    made = storage.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())
    return made.copy_(x) if not x.is_floating_point() else made


def random_tensor(chosen: random.Random, *shape: int, dtype: torch.dtype) -> Tensor:
    """Dense, transposed, sliced (so perhaps not aligned) or, rarely, with a strided last axis."""
    layout = chosen.choice(["dense"] * 3 + ["transposed", "sliced", "sliced", "strided"])
    if layout == "transposed":
        return torch.zeros(*shape, dtype=dtype).transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "sliced":
        first, more = chosen.choice([0, 1, 8]), chosen.choice([8, 13])
        return torch.zeros(*shape[:-1], shape[-1] + first + more, dtype=dtype)[
            ..., first : first + shape[-1]
        ]
    if layout == "strided" and chosen.random() < 0.2:
        return torch.zeros(*shape, 2, dtype=dtype)[..., 0]
    return torch.zeros(*shape, dtype=dtype)


def random_options(chosen: random.Random, call: dict[str, Any]) -> dict[str, Any]:
    """Options in any combination; the launchers refuse some."""
    B, Hq, Lq, Lk, P, dtype = (call[name] for name in ("B", "Hq", "Lq", "Lk", "P", "dtype"))

    def often(share: float) -> bool:
        return chosen.random() < share

    number = chosen.choice([dtype, torch.float32])
    found: dict[str, Any] = {}
    if often(0.4):
        found["key_padding_mask"] = torch.ones(B, Lk + 3, dtype=torch.bool)[:, :Lk]
    if often(0.3):  # in a table of its own, or a column of a larger one
        table = torch.ones(B, 1 + 3 * often(0.5), dtype=torch.int32)
        found["key_lengths"] = table[:, -1]
    if often(0.2):
        mask = [n if often(0.5) else 1 for n in (B, Hq, Lq, Lk)]
        found["attn_mask"] = torch.zeros(mask, dtype=chosen.choice([torch.bool, number]))
    if often(0.2):
        found["sinks"] = torch.zeros(Hq, dtype=number)
    if often(0.2):
        shape = chosen.choice([(Hq,), (Hq, Lq, P)])
        found["prefix_bias"] = torch.zeros(shape, dtype=number)
    if often(0.3):
        found["sliding_window"] = chosen.choice([1, 16, 100])
        found["prefix_in_window"] = often(0.3)
    if often(0.2):
        found["softcap"] = 30.0
    if often(0.15):
        found["dropout_p"], found["dropout_seed"] = 0.1, torch.ones(1, dtype=torch.int64)
    if often(0.1):
        found["batch_invariant"] = True
    if often(0.15):
        found["prefix_lengths"] = torch.tensor([P // 2, P - P // 2], dtype=torch.int32)
        found["prefix_index"] = torch.zeros(B, dtype=torch.int32)
    if B == 1 and Lq == Lk and often(0.5):
        found["cu_seqlens"] = torch.tensor([0, Lq], dtype=torch.int32)
    if "key_padding_mask" in found and often(0.5):
        found["spans"] = torch.zeros(B, 3, dtype=torch.int32)
    return found


def random_call(chosen: random.Random) -> Call:
    """Sizes, strides, dtypes and options at random."""
    Hkv, Lq = chosen.choice([1, 2, 3]), chosen.choice([1, 1, 1, 2, 16, 17, 64])
    call: dict[str, Any] = {
        "B": chosen.choice([1, 2, 8, 33]),
        "Hq": Hkv * chosen.choice([1, 2, 4]),
        "Lq": Lq,
        "Lk": Lq + chosen.choice([0, 1, 16, 200]),
        "P": chosen.choice([0, 1, 16, 33, 1024, 4096]),
        "dtype": chosen.choice([torch.bfloat16, torch.float16, torch.float32]),
    }
    B, Hq, Lq, Lk, P, dtype = call.values()
    D = chosen.choice([8, 16, 20, 64])
    Dv = chosen.choice([D, D, 32])
    shapes = {
        "query": (B, Hq, Lq, D), "key": (B, Hkv, Lk, D), "value": (B, Hkv, Lk, Dv),
        "prefix_key": (Hkv, P, D), "prefix_value": (Hkv, P, Dv), "grad_out": (B, Hq, Lq, Dv),
    }  # fmt: skip
    tensors = {name: random_tensor(chosen, *shape, dtype=dtype) for name, shape in shapes.items()}
    if Dv == D and chosen.random() < 0.3:
        tensors["value"], tensors["prefix_value"] = tensors["key"], tensors["prefix_key"]
    tensors["out"] = torch.zeros(B, Lq, Hq, Dv, dtype=dtype).transpose(1, 2)
    tensors["lse"] = torch.zeros(B, Hq, Lq)
    scale, is_causal = chosen.choice([0.25, -1.0, 1]), chosen.random() < 0.6
    return Call(tensors, Options(is_causal, scale, **random_options(chosen, call)))


def causal_call(
    *,
    B: int = 8,
    Lq: int,
    Lk: int,
    P: int,
    pad: bool = False,
    in_use: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Call:
    """A causal call with Hq 8, Hkv 2 and D 16. `in_use` of the Lk keys are in use, if not None."""
    shapes = [(B, 8, Lq, 16), (B, 2, Lk, 16), (B, 2, Lk, 16), (2, P, 16), (2, P, 16)]
    tensors = {n: torch.zeros(s, dtype=dtype) for n, s in zip(FIVE, shapes, strict=True)}
    mask = torch.ones(B, Lk, dtype=torch.bool) if pad else None
    given = Options(True, 0.25, key_padding_mask=mask, **options)
    if in_use is not None:  # beside other things in one tensor, as models hand them on
        words = torch.full((B, 2 + Lk // 4), in_use, dtype=torch.int32)
        given = given._replace(key_lengths=words[:, 1])
    return Call(tensors, given)


# Options of such a call, for 8 rows and for a text of 64 tokens.
SEVERAL = {
    "prefix_index": torch.tensor([0, 1, 2, -1, 0, 1, 2, 0], dtype=torch.int32),
    "prefix_lengths": torch.tensor([3000, 1000, 96], dtype=torch.int32),
}
PACKED = {"cu_seqlens": torch.tensor([0, 20, 20, 64], dtype=torch.int32)}
ATTENDED = ("is_causal", "key_padding_mask", "key_lengths", "sliding_window", *SEVERAL, *PACKED)


def attend(call: Call) -> Tensor:
    """The operator by the triton backend, as generation calls it."""
    options = call.options._asdict()
    given = {name: options[name] for name in ATTENDED}
    with torch.no_grad():
        out: Tensor = prefix_attention(*call.five, **given, backend="triton")
        return out
