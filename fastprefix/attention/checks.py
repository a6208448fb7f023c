"""Argument checks of the operator: each error names the argument, what it got, what it takes.

The tensors of every call pass one combined condition, :func:`_fit`. Only if it fails do the checks
look for what is wrong. A decoding step runs these checks once for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprefix.arguments import check_flag, check_number
from fastprefix.options import Options, asks_for_features


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


def _check_key_padding_mask(mask: Tensor, query: Tensor, key: Tensor) -> None:
    """key_padding_mask: bool [B, Lk] on the query's device."""
    _tensor("key_padding_mask", mask)
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


def _check_causal(query: Tensor, key: Tensor) -> None:
    """Causal attention is aligned to the end, so there must be a key for each query."""
    if key.shape[2] < query.shape[2]:
        raise ValueError(
            f"is_causal: got Lq = {query.shape[2]} and Lk = {key.shape[2]}, takes Lk >= Lq"
        )


def _is_finite(number: float) -> bool:
    """Whether a number is finite. A compiled graph holds for many numbers, so it trusts them."""
    return torch.compiler.is_compiling() or math.isfinite(number)


def _check_scale(scale: float) -> None:
    """scale: a finite number."""
    check_number("scale", scale)
    if not _is_finite(scale):
        raise ValueError(f"scale: got {scale}, takes a finite number")


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
    has_prefix: bool = True,
) -> None:
    """Checks a call, for those who call the launchers of the kernels directly.

    The operator makes the same checks. Values of integer tensors are read on the CPU and asserted
    on other devices. Tensors without values (``meta``, or under torch.compile) are checked for
    everything else.

    Args:
        query: [B, Hq, Lq, D], like the next four not checked yet.
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        prefix_key: [Hkv, P, D].
        prefix_value: [Hkv, P, Dv].
        options: of the call, integers in int32 or int64.
        has_prefix: False if the user gave no prefix and P = 0 stands in for it.

    Raises:
        ValueError: a shape, device, length or number does not fit.
        TypeError: a type or dtype does not fit.
    """
    check_tensors(query, key, value, prefix_key, prefix_value)
    check_plain_options(options, query, key)
    if asks_for_features(options):
        check_features(options, query, key, prefix_key.shape[1], has_prefix)


def check_plain_options(options: Options, query: Tensor, key: Tensor) -> None:
    """The options that every backend can do, against checked tensors."""
    if options.key_padding_mask is not None:
        _check_key_padding_mask(options.key_padding_mask, query, key)
    if type(options.is_causal) is not bool:
        check_flag("is_causal", options.is_causal)
    if options.is_causal:
        _check_causal(query, key)
    _check_scale(options.scale)


def check_features(options: Options, query: Tensor, key: Tensor, P: int, has_prefix: bool) -> None:
    """The options that ask for features, against checked tensors; see :func:`check_call`."""
    tensors = _Tensors(query, key, P, has_prefix)
    for place, unused, check in _CHECKS_BY_PLACE:
        if options[place] is not unused:
            check(options, tensors)
    if not torch.compiler.is_compiling():
        _check_values(options, tensors)


class _Tensors(NamedTuple):
    """What options are checked against.

    Attributes:
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D].
        P: columns of prefix_key.
        has_prefix: whether the user gave a prefix.
    """

    query: Tensor
    key: Tensor
    P: int
    has_prefix: bool


def _fit(query: Any, key: Any, value: Any, prefix_key: Any, prefix_value: Any) -> bool:
    """Whether the tensors of a call fit together; the fast test that every call makes."""
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


def _check_key_lengths(options: Options, tensors: _Tensors) -> None:
    """key_lengths: [B] integers, without packed sequences."""
    lengths = _integers("key_lengths", options.key_lengths, tensors.query)
    _check_shape("key_lengths", lengths, (tensors.query.shape[0],), "[B] of query")
    if options.cu_seqlens is not None:
        raise ValueError("cu_seqlens, key_lengths: got both, takes one of them")


def _check_attn_mask(options: Options, tensors: _Tensors) -> None:
    """attn_mask: bool or the query's dtype (or float32), broadcastable to [B, Hq, Lq, Lk]."""
    query = tensors.query
    mask = _tensor("attn_mask", options.attn_mask)
    full = (*query.shape[:3], tensors.key.shape[2])
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


def _check_cu_seqlens(options: Options, tensors: _Tensors) -> None:
    """cu_seqlens: [M + 1] integers over the one row of a batch of 1, without masks."""
    query, key = tensors.query, tensors.key
    cu_seqlens = _integers("cu_seqlens", options.cu_seqlens, query)
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


def _check_pair(options: Options) -> None:
    """prefix_lengths and prefix_index come together."""
    if (options.prefix_lengths is None) != (options.prefix_index is None):
        raise ValueError("prefix_lengths, prefix_index: got one of the two, takes both or neither")


def _check_prefix_lengths(options: Options, tensors: _Tensors) -> None:
    """prefix_lengths: [N] integers."""
    _check_pair(options)
    if not tensors.has_prefix:
        raise ValueError("prefix_lengths: got no prefix_key and prefix_value, takes both")
    lengths = _integers("prefix_lengths", options.prefix_lengths, tensors.query)
    if lengths.dim() != 1:
        raise ValueError(f"prefix_lengths: got shape {_shape(lengths)}, takes [N]")


def _check_prefix_index(options: Options, tensors: _Tensors) -> None:
    """prefix_index: [B] integers, [M] with cu_seqlens."""
    _check_pair(options)
    index = _integers("prefix_index", options.prefix_index, tensors.query)
    if options.cu_seqlens is None:
        _check_shape("prefix_index", index, (tensors.query.shape[0],), "[B] of query")
    else:
        expected = (options.cu_seqlens.shape[0] - 1,)
        _check_shape("prefix_index", index, expected, "[M], the sequences of cu_seqlens")


def _check_sinks(options: Options, tensors: _Tensors) -> None:
    """sinks: [Hq] in the query's dtype or float32."""
    sinks = _tensor("sinks", options.sinks)
    _check_shape("sinks", sinks, (tensors.query.shape[1],), "[Hq] of query")
    _check_added("sinks", sinks, tensors.query)


def _check_prefix_bias(options: Options, tensors: _Tensors) -> None:
    """prefix_bias: [Hq] or [Hq, Lq, P], in the query's dtype or float32."""
    bias = _tensor("prefix_bias", options.prefix_bias)
    _, Hq, Lq, _ = tensors.query.shape
    P = tensors.P
    if tuple(bias.shape) not in ((Hq,), (Hq, Lq, P)):
        raise ValueError(
            f"prefix_bias: got shape {_shape(bias)}, takes [Hq] = {[Hq]} or "
            f"[Hq, Lq, P] = {[Hq, Lq, P]}"
        )
    _check_added("prefix_bias", bias, tensors.query)


def _check_sliding_window(options: Options, tensors: _Tensors) -> None:
    """sliding_window: a whole number of keys."""
    window = options.sliding_window
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
        raise TypeError(f"sliding_window: got {type(window).__name__}, takes an int or None")
    if window < 1:
        raise ValueError(f"sliding_window: got {window}, takes 1 or more")


def _check_prefix_in_window(options: Options, tensors: _Tensors) -> None:
    """prefix_in_window: True or False, with a window and a key for each query."""
    check_flag("prefix_in_window", options.prefix_in_window)
    if not options.prefix_in_window:
        return
    if options.sliding_window is None:
        raise ValueError("prefix_in_window: got no sliding_window, takes one")
    Lq, Lk = tensors.query.shape[2], tensors.key.shape[2]
    if Lk < Lq:
        raise ValueError(f"prefix_in_window: got Lq = {Lq} and Lk = {Lk}, takes Lk >= Lq")


def _check_softcap(options: Options, tensors: _Tensors) -> None:
    """softcap: a finite number above 0."""
    softcap = options.softcap
    check_number("softcap", softcap)
    if softcap is None or not (_is_finite(softcap) and softcap > 0.0):
        raise ValueError(f"softcap: got {softcap}, takes a finite number above 0, or None")


def _check_dropout(options: Options, tensors: _Tensors) -> None:
    """dropout_p: a share below 1."""
    dropout_p = options.dropout_p
    check_number("dropout_p", dropout_p)
    if dropout_p is None or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, takes 0 <= dropout_p < 1")


def _check_batch_invariant(options: Options, tensors: _Tensors) -> None:
    """batch_invariant: True or False, and not with dropout."""
    check_flag("batch_invariant", options.batch_invariant)
    if options.batch_invariant and options.dropout_p:
        raise ValueError("batch_invariant, dropout_p: got both, takes one of them")


# The checks of the options that ask for features, in the order in which they run. Those of
# is_causal, scale and key_padding_mask run for every call.
CHECKS: dict[str, Callable[[Options, _Tensors], None]] = {
    "key_lengths": _check_key_lengths,
    "attn_mask": _check_attn_mask,
    "cu_seqlens": _check_cu_seqlens,
    "prefix_lengths": _check_prefix_lengths,
    "prefix_index": _check_prefix_index,
    "sinks": _check_sinks,
    "prefix_bias": _check_prefix_bias,
    "sliding_window": _check_sliding_window,
    "prefix_in_window": _check_prefix_in_window,
    "softcap": _check_softcap,
    "dropout_p": _check_dropout,
    "batch_invariant": _check_batch_invariant,
}
_CHECKS_BY_PLACE = tuple(
    (Options._fields.index(name), Options._field_defaults[name], check)
    for name, check in CHECKS.items()
)


def _check_values(options: Options, tensors: _Tensors) -> None:
    """Values of integers: read on the CPU, asserted on other devices without waiting for them."""
    lengths, index, cu_seqlens = options.prefix_lengths, options.prefix_index, options.cu_seqlens
    P = tensors.P
    if options.key_lengths is not None:
        _check_values_of_key_lengths(options.key_lengths, options, tensors)
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
        T = tensors.query.shape[2]
        steps = cu_seqlens[1:] >= cu_seqlens[:-1]
        _check_value(
            steps.all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T),
            f"cu_seqlens: takes offsets from 0 to Lq = {T} that never decrease",
            cu_seqlens,
        )


def _check_values_of_key_lengths(key_lengths: Tensor, options: Options, tensors: _Tensors) -> None:
    """0 .. Lk; and Lq .. Lk where there must be a key for each query and the values are at hand."""
    Lq, Lk = tensors.query.shape[2], tensors.key.shape[2]
    if type(key_lengths) is not Tensor or key_lengths.device.type != "cpu":
        return  # the backends limit them; an assertion would cost each layer of a step five kernels
    least = Lq if options.is_causal or options.prefix_in_window else 0
    values: list[int] = key_lengths.tolist()  # a static cache asks this in every layer
    if values and not (least <= min(values) and max(values) <= Lk):
        why = f" (Lq = {Lq}, with is_causal or prefix_in_window)" if least else ""
        raise ValueError(f"key_lengths: takes {least}{why} to Lk = {Lk}; got {values}")


def _check_value(holds: Tensor, message: str, values: Tensor) -> None:
    if type(values) is not Tensor or values.device.type == "meta":
        return  # a tensor without values
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


def _integers(name: str, value: Any, query: Tensor) -> Tensor:
    tensor = _tensor(name, value)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got {tensor.dtype}, takes torch.int32 or torch.int64")
    _same_device(name, tensor, query)
    return tensor


def _check_operand(name: str, tensor: Any, shape: str, query: Tensor) -> None:
    _tensor(name, tensor)
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


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, takes a torch.Tensor")
    return value


def _same_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name}: got device {tensor.device}, takes the query's {query.device}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
