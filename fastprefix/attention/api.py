"""The public function: it checks a call, chooses a backend and runs it."""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastprefix.arguments import check_flag, check_number, unknown_argument
from fastprefix.attention import checks
from fastprefix.attention.run import run_known, run_op
from fastprefix.attention.selection import UNEQUAL_HEAD_SIZES, choose_backend
from fastprefix.attention.step import Step
from fastprefix.options import (
    FLAGS,
    INTEGERS,
    Options,
    asks_for_features,
    features_of,
    told_by_kind,
)

BackendName = Literal["auto", "reference", "composed", "triton"]


@overload
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = ...,
    prefix_value: Tensor | None = ...,
    *,
    prefix_index: Tensor | None = ...,
    prefix_lengths: Tensor | None = ...,
    attn_mask: Tensor | None = ...,
    key_padding_mask: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    sliding_window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    prefix_bias: Tensor | None = ...,
    prefix_in_window: bool = ...,
    batch_invariant: bool = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = ...,
    prefix_value: Tensor | None = ...,
    *,
    prefix_index: Tensor | None = ...,
    prefix_lengths: Tensor | None = ...,
    attn_mask: Tensor | None = ...,
    key_padding_mask: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    sliding_window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    prefix_bias: Tensor | None = ...,
    prefix_in_window: bool = ...,
    batch_invariant: bool = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    *,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    prefix_in_window: bool = False,
    batch_invariant: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over [prefix ; sequence] with one copy of the prefix for all rows.

    The result is the same as with the prefix concatenated to every row's keys and values. All
    queries see all of their prefix: causality, windows and masks apply only to the sequence part,
    except for ``prefix_in_window``. Query i stands at position p_i = i + Lk - Lq among the
    sequence's keys. The output is differentiable in query, key, value, prefix_key, prefix_value,
    sinks and a prefix_bias of shape [Hq]; the prefix's gradient is summed over rows. torch.func
    gives the same gradients. Only the reference backend has forward-mode and second derivatives.

    Args:
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D], Hq a multiple of Hkv (GQA, MQA). Never repeated.
        value: [B, Hkv, Lk, Dv].
        prefix_key: [Hkv, P, D], shared by all rows; P may be 0. None for no prefix. Several
            prefixes lie end to end along P.
        prefix_value: [Hkv, P, Dv], or None.
        prefix_index: int32 or int64 [B] ([M] with cu_seqlens), which of several prefixes a row
            attends to; -1 for none. Only together with prefix_lengths.
        prefix_lengths: int32 or int64 [N], lengths of several prefixes, which add up to P.
        attn_mask: bool (True = attend) or additive (in the query's dtype or float32),
            broadcastable to [B, Hq, Lq, Lk]; for the sequence part only. Additive values of
            -1e30 or less hide the key. Only the reference backend computes its gradient.
        key_padding_mask: bool [B, Lk], True = real token; any pattern.
        key_lengths: int32 or int64 [B], how many keys of a longer buffer are in use, such as those
            of a static cache; from 0 to Lk. Row b has keys 0 .. key_lengths[b] - 1 and no others:
            its query i stands at p_i = i + key_lengths[b] - Lq. What lies beyond is not read (it
            may be NaN), and its gradients are zeros. Masks keep their shapes. Not with cu_seqlens.
        cu_seqlens: int32 or int64 [M + 1], offsets of M sequences that lie end to end in a batch
            of 1, with Lq = Lk. Tokens attend inside their own sequence (and to its prefix). Not
            with key_padding_mask or attn_mask.
        dropout_p: share of the normalised weights that is dropped; the others are multiplied by
            1 / (1 - dropout_p). The log-sum-exp does not change. The seed is drawn from PyTorch's
            default generator. With the same seed the reference and triton backends drop the same
            weights; the composed backend drops others, always the same ones for a call's shapes.
        is_causal: query i sees sequence keys 0 .. p_i. Unlike in SDPA the mask is aligned to the
            last key (as a KV cache needs it), and may be combined with attn_mask. It takes a key
            for each query: Lk >= Lq, and key_lengths of at least Lq. Where the values of
            key_lengths are not read, queries with p_i < 0 see no key of the sequence.
        scale: factor on the scores; 1 / sqrt(D) if None.
        sliding_window: query i sees sequence keys j with |p_i - j| < sliding_window (padding
            counts, as in transformers).
        softcap: scores become softcap * tanh(scaled score / softcap), before any bias.
        sinks: [Hq], in the query's dtype or float32: exp(sinks[h]) is added to each softmax
            denominator, without a value of its own. The log-sum-exp includes it.
        prefix_bias: added to the prefix part's scores after the cap, in the query's dtype or
            float32: [Hq] per head, or [Hq, Lq, P] by packed column. Only the reference backend
            computes the gradient of the second shape. -1e30 or less hides the key.
        prefix_in_window: for a prefix that is text (a prefilled prompt): it slides out of the
            sliding_window as the same text would. Token j of a row's P tokens stands P - j + r_i
            before query i, where r_i counts the row's real tokens before p_i.
        batch_invariant: a row (with cu_seqlens a sequence) has the same bits of output and
            log-sum-exp alone and in any batch, whatever prefixes the other rows have. With up to
            64 queries this holds for any padding; with more, key_padding_mask is refused (use
            cu_seqlens). Not with dropout_p. It does not hold for gradients. Some calls take
            longer, because the work is not split by the size of the batch.
        return_lse: also return the log-sum-exp of the scores.
        backend: "auto", "reference", "composed" or "triton"; see
            :mod:`fastprefix.attention.selection`. A named backend never falls back.
        unknown: must be empty; any other name is refused.

    Returns:
        [B, Hq, Lq, Dv]; rows that see nothing are zeros. With ``return_lse`` also the natural
        log-sum-exp [B, Hq, Lq] in float32 (float64 for float64 inputs), -inf for rows that see
        nothing; no gradient flows through it.

    Raises:
        ValueError: a shape, device, mask, length or number does not fit, or two arguments do not
            go together; the message names the argument. Values of prefix_index, prefix_lengths
            and cu_seqlens are read on the CPU, asserted on the device elsewhere, and trusted under
            torch.compile. Values of key_lengths are checked only on the CPU; elsewhere, and under
            torch.compile, the backends limit them to 0 .. Lk.
        TypeError: an unknown argument, not a tensor, number or flag where one goes, or a dtype
            does not fit.
        RuntimeError: the backend cannot do what the call needs; the message names those that can.
        NotImplementedError: a forward-mode or second derivative of another backend than reference.

    Example:
        >>> import torch
        >>> from fastprefix import prefix_attention
        >>> q, k, v = torch.randn(3, 8, 12, 10, 64).unbind()
        >>> prefix_key, prefix_value = torch.randn(2, 12, 32, 64).unbind()
        >>> prefix_attention(q, k, v, prefix_key, prefix_value, is_causal=True).shape
        torch.Size([8, 12, 10, 64])
    """
    if unknown:  # a wrapper would cost every call microseconds
        known = list(inspect.signature(prefix_attention).parameters)[:-1]
        raise unknown_argument("prefix_attention", next(iter(unknown)), known)
    if type(return_lse) is not bool:
        check_flag("return_lse", return_lse)
    if dropout_p != 0.0:
        check_number("dropout_p", dropout_p)  # here, because Options has None for no dropout
    if scale is None:
        scale = default_scale(query)
    options = Options(  # by position, in the order of the table: names take three times as long
        is_causal,
        scale,
        key_padding_mask,
        key_lengths,
        attn_mask,
        prefix_index,
        prefix_lengths,
        cu_seqlens,
        sliding_window,
        prefix_in_window,
        sinks,
        prefix_bias,
        softcap or None,
        dropout_p or None,
        None,  # dropout_seed
        batch_invariant,
    )
    out, lse = attention_with_options(query, key, value, prefix_key, prefix_value, options, backend)
    return (out, lse.detach()) if return_lse else out


def attention_with_options(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    options: Options,
    backend: str = "auto",
    step: Step | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`prefix_attention` does, for callers that hold the options as one value.

    Args:
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        prefix_key: [Hkv, P, D], or None.
        prefix_value: [Hkv, P, Dv], or None.
        options: as the user gave them: not checked yet, and integers may be int64.
        backend: see :func:`prefix_attention`.
        step: what other calls with the same prefix_index, prefix_lengths and cu_seqlens left for
            this one, such as those of the layers before.

    Returns:
        out [B, Hq, Lq, Dv] and the log-sum-exp [B, Hq, Lq], which is not detached.

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError: see :func:`prefix_attention`.
    """
    if (prefix_key is None) != (prefix_value is None):
        raise ValueError("prefix_key, prefix_value: got one of the two, takes both or neither")
    has_prefix = prefix_key is not None
    if prefix_key is None or prefix_value is None:
        prefix_key, prefix_value = _no_prefix(key, value)
    if told_by_kind(options):
        known = run_known((query, key, value, prefix_key, prefix_value), options, backend, step)
        if known is not None:
            return known
    checks.check_tensors(query, key, value, prefix_key, prefix_value)
    checks.check_plain_options(options, query, key)
    plain = not asks_for_features(options)
    features = _NO_FEATURES
    if not plain:
        checks.check_features(options, query, key, prefix_key.shape[1], has_prefix, step)
        options = _for_backends(options, query, step)
        features = features_of(options)
    elif type(options.is_causal) is not bool or type(options.scale) is not float:
        options = _for_backends(options, query)
    D, Dv = query.shape[-1], value.shape[-1]
    if Dv != D:
        features = features | _UNEQUAL_HEAD_SIZES  # PyTorch 2.9 cannot trace |= of frozensets
    name, _ = choose_backend(backend, query.device.type, query.dtype, features, max(D, Dv))
    return run_op(query, key, value, prefix_key, prefix_value, options, name, step)


_NO_FEATURES: frozenset[str] = frozenset()
_UNEQUAL_HEAD_SIZES = frozenset({UNEQUAL_HEAD_SIZES})


def default_scale(query: Tensor) -> float:
    """1 / sqrt(D). What has no D gets 1: the checks refuse it, with a message."""
    shape: tuple[int, ...] = getattr(query, "shape", ())
    return 1.0 / math.sqrt(shape[-1]) if len(shape) and shape[-1] else 1.0


def _no_prefix(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A prefix without tokens. What is no tensor is left to the checks."""
    if not (isinstance(key, Tensor) and isinstance(value, Tensor)):
        return key, value
    if key.dim() != 4 or value.dim() != 4:
        return key, value
    Hkv = value.shape[1]
    return key.new_empty(Hkv, 0, key.shape[3]), value.new_empty(Hkv, 0, value.shape[3])


def _for_backends(options: Options, query: Tensor, step: Step | None = None) -> Options:
    """Checked options as the op and the backends read them, with a seed if there is dropout."""
    changes: dict[str, Any] = {}
    for name in FLAGS:
        value = getattr(options, name)
        if type(value) is not bool:
            changes[name] = bool(value)
    for name in INTEGERS:
        tensor = getattr(options, name)
        if tensor is not None:
            changes[name] = tensor.to(torch.int32) if step is None else step.as_int32(tensor)
    if type(options.scale) is not float:
        changes["scale"] = float(options.scale)
    if options.dropout_p is not None:
        changes["dropout_p"] = float(options.dropout_p)
        # from the default generator, so that checkpointing draws the same seed again
        changes["dropout_seed"] = torch.randint(2**63 - 1, (1,), device=query.device)
    return options._replace(**changes) if changes else options
