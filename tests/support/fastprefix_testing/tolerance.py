"""The rule of accuracy that every numerical test here applies.

A result is compared with the exact one, which is computed in float64, and with plain PyTorch's in
the dtype of the result. Its error may be twice that of plain PyTorch, plus a few roundings.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Roundings added to twice plain PyTorch's error. Where plain PyTorch is right by luck (one key, a
# power of two), rounding of inputs, products and result still costs the others a few units, and
# where scores are large, another order of summation does (processors differ in theirs, and numpy's
# from PyTorch's). float64 has no better yardstick than itself.
ROUNDINGS = {torch.float64: 64, torch.float32: 32, torch.bfloat16: 2, torch.float16: 2}

# Error allowed in a float32 log-sum-exp of 16-bit inputs: PyTorch's own CPU flash kernel
# approximates exp for those, to about 6e-5.
LSE_OF_HALF = 1e-4


def assert_within(
    name: str,
    found: Tensor,
    exact: Tensor,
    plain: Tensor,
    *,
    dtype: torch.dtype | None = None,
    floor: float = 1.0,
) -> None:
    """Asserts the rule for one tensor.

    Args:
        name: of the tensor, for the message.
        found: what is judged.
        exact: the same in float64, and -inf where nothing is seen.
        plain: what plain PyTorch finds.
        dtype: whose roundings count; `plain`'s if None.
        floor: the roundings are those of the largest exact number, and at least of this one. It is
            1 but for the gradients of the kernels, where it is 4. With one or two keys plain
            PyTorch cancels exactly, but a fused backward computes delta from an output that is
            already rounded. The numbers that cancel are a few units large, so their roundings are
            too, although little is left of them.
    """
    dtype = plain.dtype if dtype is None else dtype
    assert found.shape == exact.shape, name
    nothing = exact == float("-inf")  # only in the lse
    assert torch.equal(found == float("-inf"), nothing), f"{name}: -inf in other places"
    if not exact.numel():
        return
    found, exact, plain = (x.double().masked_fill(nothing, 0.0) for x in (found, exact, plain))
    rounding = ROUNDINGS[dtype] * torch.finfo(dtype).eps * max(floor, exact.abs().max().item())
    allowed = 2 * (plain - exact).abs().max().item() + rounding
    error = (found - exact).abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"  # NaN fails too


def assert_accurate(
    found: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    gradient_floor: float = 1.0,
    lse_of_half: float | None = None,
) -> None:
    """Asserts the rule for the results of a call, by their names.

    Args:
        found: results to judge; some of the exact ones.
        exact: all results in float64.
        plain: all results of plain PyTorch in `dtype`.
        dtype: of the call. "lse" is float32 even if this is a 16-bit type.
        gradient_floor: the floor of :func:`assert_within` for all but "out" and "lse".
        lse_of_half: error allowed in the lse of 16-bit inputs, in place of the rule.
    """
    wide = torch.promote_types(dtype, torch.float32)
    assert found.keys() <= exact.keys()
    for name, result in found.items():
        own = wide if name == "lse" else dtype
        assert result.shape == exact[name].shape, name
        # the gradient of a sink or a bias has the dtype of that tensor
        assert result.dtype == (wide if name == "lse" else plain[name].dtype), name
        assert name == "lse" or result.isfinite().all(), name
        if name == "lse" and dtype != wide and lse_of_half is not None:
            torch.testing.assert_close(result.double(), exact[name], rtol=0, atol=lse_of_half)
        else:
            floor = 1.0 if name in ("out", "lse") else gradient_floor
            assert_within(name, result, exact[name], plain[name], dtype=own, floor=floor)
