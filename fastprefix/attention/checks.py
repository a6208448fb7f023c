"""Argument checks of the operator: each error names the argument, what it got, what it takes.

The tensors of every call pass one combined condition, :func:`_fit`; what is wrong is looked for
only where it fails. A decoding step runs these checks once a layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastprefix.arguments import check_flag, check_number
from fastprefix.options import Options


def check_tensors(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor
) -> None:
    """Types, ranks, shapes, dtypes and devices of query, key, value and the prefix."""
    if _fit(query, key, value, prefix_key, prefix_value):
        return
    _check_operand("query", query, "[B, Hq, Lq, D]", query)
    _check_operand("key", key, "[B, Hkv, Lk, D]", query)
    _check_operand("value", value, "[B, Hkv, Lk, Dv]", query)
    B, Hq, _, D = query.shape
    _, Hkv, Lk, Dv = value.shape
    _check_shape("key", key, (B, Hkv, Lk, D), "B and D of query, Hkv and Lk of value")
    _check_shape("value", value, (B, Hkv, Lk, Dv), "B of query")
    if D == 0 or Dv == 0:
        raise ValueError(f"query, value: got head sizes {D} and {Dv}, takes at least 1")
    if Hkv == 0 or Hq % Hkv != 0:
        raise ValueError(f"query: got {Hq} heads, takes a multiple of the {Hkv} key/value heads")
    _check_operand("prefix_key", prefix_key, "[Hkv, P, D]", query)
    _check_operand("prefix_value", prefix_value, "[Hkv, P, Dv]", query)
    P = prefix_value.shape[1]
    _check_shape("prefix_value", prefix_value, (Hkv, P, Dv), "Hkv and Dv of value")
    expected = (Hkv, P, D)
    _check_shape("prefix_key", prefix_key, expected, "Hkv of value, P of prefix_value, D of query")


def check_key_padding_mask(mask: Tensor, query: Tensor, key: Tensor) -> None:
    """key_padding_mask: bool [B, Lk] on the query's device."""
    _is_tensor("key_padding_mask", mask)
    expected = (query.shape[0], key.shape[2])
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"key_padding_mask: got shape {_shape(mask)}, takes [B, Lk] = {list(expected)} "
            "(the prefix is not part of it)"
        )
    if mask.dtype is not torch.bool:
        raise TypeError(
            f"key_padding_mask: got {mask.dtype}, takes torch.bool with True for real tokens"
        )
    _same_device("key_padding_mask", mask, query)


def check_causal(query: Tensor, key: Tensor) -> None:
    """Causal attention is aligned to the end, so there must be a key for each query."""
    if key.shape[2] < query.shape[2]:
        raise ValueError(
            f"is_causal: got Lq = {query.shape[2]} and Lk = {key.shape[2]}, takes Lk >= Lq"
        )


def check_flags(**flags: object) -> None:
    """Each argument that is True or False."""
    for name, value in flags.items():
        check_flag(name, value)


def _is_finite(number: float) -> bool:
    """Whether a number is finite; a graph that holds for many numbers is not asked."""
    return torch.compiler.is_compiling() or math.isfinite(number)


def check_scale(scale: float) -> None:
    """scale: a finite number."""
    check_number("scale", scale)
    if not _is_finite(scale):
        raise ValueError(f"scale: got {scale}, takes a finite number")


def check_dropout_p(dropout_p: float) -> None:
    """dropout_p: a number from 0 to less than 1."""
    check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, takes 0 <= dropout_p < 1")


def check_options(options: Options, query: Tensor, key: Tensor, P: int, has_prefix: bool) -> None:
    """All that only some calls use, each alone and with the others.

    Args:
        options: of the call.
        query: [B, Hq, Lq, D], checked.
        key: [B, Hkv, Lk, D], checked.
        P: columns of prefix_key.
        has_prefix: whether the call gave prefix_key and prefix_value.
    """
    _check_attn_mask(options.attn_mask, query, key)
    _check_cu_seqlens(options, query, key)
    _check_packed_prefixes(options, query, has_prefix)
    _check_sinks(options.sinks, query)
    _check_prefix_bias(options.prefix_bias, query, P)
    _check_numbers(options, query, key)
    if not torch.compiler.is_compiling():
        _check_values(options, query, P)


def _fit(query: Any, key: Any, value: Any, prefix_key: Any, prefix_value: Any) -> bool:
    """Whether all is well, at the least cost."""
    if not (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and isinstance(prefix_key, Tensor)
        and isinstance(prefix_value, Tensor)
    ):
        return False
    shape, value_shape, prefix_shape = query.shape, value.shape, prefix_value.shape
    if not (len(shape) == len(value_shape) == 4 and len(prefix_shape) == 3):
        return False
    B, Hq, _, D = shape
    _, Hkv, Lk, Dv = value_shape
    P = prefix_shape[1]
    dtype, device = query.dtype, query.device
    return (
        value_shape[0] == B
        and key.shape == (B, Hkv, Lk, D)
        and prefix_key.shape == (Hkv, P, D)
        and prefix_shape == (Hkv, P, Dv)
        and D > 0
        and Dv > 0
        and Hkv > 0
        and Hq % Hkv == 0
        and dtype.is_floating_point
        and key.dtype == value.dtype == prefix_key.dtype == prefix_value.dtype == dtype
        and key.device == value.device == prefix_key.device == prefix_value.device == device
    )


def _check_attn_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    """attn_mask: bool or the query's dtype (or float32), broadcastable to [B, Hq, Lq, Lk]."""
    if mask is None:
        return
    _is_tensor("attn_mask", mask)
    full = (*query.shape[:3], key.shape[2])
    shape = tuple(mask.shape)
    padded = (1,) * (4 - len(shape)) + shape
    if len(shape) > 4 or any(got not in (1, want) for got, want in zip(padded, full, strict=True)):
        raise ValueError(
            f"attn_mask: got shape {_shape(mask)}, takes one that broadcasts to "
            f"[B, Hq, Lq, Lk] = {list(full)} (the prefix is not part of it)"
        )
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"attn_mask: got {mask.dtype}, takes torch.bool (True = attend), torch.float32 or "
            f"the query's {query.dtype}"
        )
    _same_device("attn_mask", mask, query)


def _check_cu_seqlens(options: Options, query: Tensor, key: Tensor) -> None:
    """cu_seqlens: [M + 1] integers over the one row of a batch of 1, without masks."""
    cu_seqlens = options.cu_seqlens
    if cu_seqlens is None:
        return
    _check_integers("cu_seqlens", cu_seqlens, query)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: got shape {_shape(cu_seqlens)}, takes [M + 1], M at least 1")
    if query.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens: got a query of batch size {query.shape[0]}, takes 1: the sequences lie "
            "end to end along Lq"
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"cu_seqlens: got Lq = {query.shape[2]} and Lk = {key.shape[2]}, takes Lq = Lk"
        )
    for name in ("key_padding_mask", "attn_mask"):
        if getattr(options, name) is not None:
            raise ValueError(f"cu_seqlens, {name}: got both, takes one of them")


def _check_packed_prefixes(options: Options, query: Tensor, has_prefix: bool) -> None:
    """prefix_lengths: [N] integers, and with them prefix_index: [B] integers, [M] if packed."""
    lengths, index = options.prefix_lengths, options.prefix_index
    if (lengths is None) != (index is None):
        raise ValueError("prefix_lengths, prefix_index: got one of the two, takes both or neither")
    if lengths is None or index is None:
        return
    if not has_prefix:
        raise ValueError("prefix_lengths: got no prefix_key and prefix_value, takes both")
    _check_integers("prefix_lengths", lengths, query)
    if lengths.dim() != 1:
        raise ValueError(f"prefix_lengths: got shape {_shape(lengths)}, takes [N]")
    _check_integers("prefix_index", index, query)
    if options.cu_seqlens is None:
        _check_shape("prefix_index", index, (query.shape[0],), "[B] of query")
    else:
        expected = (options.cu_seqlens.shape[0] - 1,)
        _check_shape("prefix_index", index, expected, "[M], the sequences of cu_seqlens")


def _check_sinks(sinks: Tensor | None, query: Tensor) -> None:
    """sinks: [Hq] in the query's dtype or float32."""
    if sinks is None:
        return
    _is_tensor("sinks", sinks)
    _check_shape("sinks", sinks, (query.shape[1],), "[Hq] of query")
    _check_added("sinks", sinks, query)


def _check_prefix_bias(bias: Tensor | None, query: Tensor, P: int) -> None:
    """prefix_bias: [Hq] or [Hq, Lq, P], in the query's dtype or float32."""
    if bias is None:
        return
    _is_tensor("prefix_bias", bias)
    _, Hq, Lq, _ = query.shape
    if tuple(bias.shape) not in ((Hq,), (Hq, Lq, P)):
        raise ValueError(
            f"prefix_bias: got shape {_shape(bias)}, takes [Hq] = {[Hq]} or "
            f"[Hq, Lq, P] = {[Hq, Lq, P]}"
        )
    _check_added("prefix_bias", bias, query)


def _check_numbers(options: Options, query: Tensor, key: Tensor) -> None:
    """sliding_window, prefix_in_window, softcap, dropout_p and batch_invariant."""
    window = options.sliding_window
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
            raise TypeError(f"sliding_window: got {type(window).__name__}, takes an int or None")
        if window < 1:
            raise ValueError(f"sliding_window: got {window}, takes 1 or more")
    if options.prefix_in_window:
        if window is None:
            raise ValueError("prefix_in_window: got no sliding_window, takes one")
        if key.shape[2] < query.shape[2]:
            raise ValueError(
                f"prefix_in_window: got Lq = {query.shape[2]} and Lk = {key.shape[2]}, takes "
                "Lk >= Lq"
            )
    softcap = options.softcap
    if softcap is not None:
        check_number("softcap", softcap)
    if softcap is not None and not (_is_finite(softcap) and softcap > 0.0):
        raise ValueError(f"softcap: got {softcap}, takes a finite number above 0, or None")
    if options.dropout_p is None:
        return
    check_dropout_p(options.dropout_p)
    if options.batch_invariant:
        raise ValueError("batch_invariant, dropout_p: got both, takes one of them")


def _check_values(options: Options, query: Tensor, P: int) -> None:
    """What the integers say: read on the CPU, asserted on the device elsewhere, without a wait."""
    lengths, index, cu_seqlens = options.prefix_lengths, options.prefix_index, options.cu_seqlens
    if lengths is not None and index is not None:
        N = lengths.shape[0]
        _check_value(
            (lengths >= 0).all() & (lengths.sum() == P),
            f"prefix_lengths: takes lengths of 0 or more that add up to {P}, the columns of "
            "prefix_key",
            lengths,
        )
        _check_value(
            ((index >= -1) & (index < N)).all(),
            f"prefix_index: takes -1 (no prefix) to {N - 1}, numbers of the {N} prefix_lengths",
            index,
        )
    if cu_seqlens is not None:
        T = query.shape[2]
        steps = cu_seqlens[1:] >= cu_seqlens[:-1]
        _check_value(
            steps.all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T),
            f"cu_seqlens: takes offsets from 0 to Lq = {T} that never decrease",
            cu_seqlens,
        )


def _check_value(holds: Tensor, message: str, values: Tensor) -> None:
    if type(values) is not Tensor or values.device.type == "meta":
        return  # fake: there is nothing to read
    if values.device.type == "cpu":
        if not holds:
            raise ValueError(f"{message}; got {values.tolist()}")
    else:
        torch._assert_async(holds, message)


def _check_added(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dtype not in (torch.float32, query.dtype):
        raise TypeError(
            f"{name}: got {tensor.dtype}, takes torch.float32 or the query's {query.dtype}"
        )
    _same_device(name, tensor, query)


def _check_integers(name: str, tensor: Any, query: Tensor) -> None:
    _is_tensor(name, tensor)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got {tensor.dtype}, takes torch.int32 or torch.int64")
    _same_device(name, tensor, query)


def _check_operand(name: str, tensor: Any, shape: str, query: Tensor) -> None:
    _is_tensor(name, tensor)
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{name}: got shape {_shape(tensor)}, takes {shape}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: got {tensor.dtype}, takes a floating-point dtype")
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, takes the query's {query.dtype}")
    _same_device(name, tensor, query)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: got shape {_shape(tensor)}, takes {list(expected)} ({meaning})")


def _is_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, takes a torch.Tensor")


def _same_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name}: got device {tensor.device}, takes the query's {query.device}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
