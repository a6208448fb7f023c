"""Two calls of PyTorch's attention kernels, one for the prefix and one for the sequence, merged.

The prefix call folds batch and query group into rows: [1, Hkv, B·g·Lq, D] against one copy of the
prefix [1, Hkv, P, D]. Its backward therefore returns the prefix's gradient already summed over
the batch. In the backward both calls get the GLOBAL output and log-sum-exp, which makes each
part's gradient the exact share of the whole (FlashAttention-2, section 3.1: dS = P * (dP - delta),
where P and delta depend on the other part only through lse and out).

Runs on the CPU and on CUDA: on both, PyTorch has kernels that return the log-sum-exp and take it
back. On CUDA nothing waits for the device. So where the CPU cuts a call into one part for each
prefix, CUDA has one part for all of them, and a mask hides the other rows' prefixes.

- kernels: the kernels of each device behind one signature; seen: what one call of them sees
- flash: the CPU's kernel, layouts and masks; cuda: CUDA's kernels
- sequence: how the sequence part is laid out for them
- lengths: the keys in use of a longer buffer
- plain: calls with one prefix, one sequence a row, and masks
- parts, features: what only some calls use (several prefixes, packed sequences, windows, sinks, a
  bias), out of the same kernels
- chunks, scores: calls on the CPU with a softcap or with dropout, which its kernel cannot do, by
  explicit formulas over the scores of one chunk at a time
"""

from __future__ import annotations

from torch import Tensor

from fastprefix.attention.backends.composed import features, plain, scores
from fastprefix.attention.backends.composed.lengths import with_unused, without_unused
from fastprefix.options import Options


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`fastprefix.attention.backends.reference.forward`.

    The output lies in memory as [B, Lq, Hq, Dv].
    """
    if options.key_lengths is not None:
        key, value, options = without_unused(query, key, value, options)
    inputs = (query, key, value, prefix_key, prefix_value)
    if scores.is_for(options):
        out, lse = scores.forward(*inputs, options)
    elif plain.is_plain(options):
        out, lse = plain.forward(*inputs, options)
    else:
        out, lse = features.forward(*inputs, options)
    return _as_blhd(out), lse.contiguous()


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, prefix_key, prefix_value, sinks and prefix_bias.

    Args:
        grad_out: gradient of out, [B, Hq, Lq, Dv].
        query: as in the forward, like key, value, the prefix and the options.
        key: see query.
        value: see query.
        prefix_key: see query.
        prefix_value: see query.
        out: the forward's output.
        lse: the forward's log-sum-exp.
        options: see query.
        needs: which of the seven gradients to compute.

    Returns:
        The gradients, None where not needed; that of prefix_bias only where it is [Hq]. Those of
        query, key and value lie in memory as [B, L, H, D], the others are contiguous.
    """
    buffers = key, value
    key, value, options = without_unused(query, key, value, options)
    inputs = (grad_out, query, key, value, prefix_key, prefix_value)
    if scores.is_for(options):
        found = scores.backward(*inputs, out, lse, options, needs)
    elif plain.is_plain(options):
        found = (*plain.backward(*inputs, out, lse, options, needs[:5]), None, None)
    else:
        found = features.backward(*inputs, out, lse, options, needs)
    dk, dv = map(with_unused, found[1:3], buffers)
    return (
        *(None if grad is None else _as_blhd(grad) for grad in (found[0], dk, dv)),
        *(None if grad is None else grad.contiguous() for grad in found[3:]),
    )


def _as_blhd(x: Tensor) -> Tensor:
    """[B, H, L, D] laid out in memory as [B, L, H, D]; copies only if it is not."""
    transposed = x.transpose(1, 2)
    return x if transposed.is_contiguous() else transposed.contiguous().transpose(1, 2)
