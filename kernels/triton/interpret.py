"""Triton's interpreter, made to behave as a GPU does.

It keeps bfloat16 as raw 16-bit integers. Up to Triton 3.9 it multiplies those integers in `tl.dot`
and truncates instead of rounding when it casts from float32. Up to 3.6 it bounds loops with
int(array of one element), which NumPy 2.4 refuses. `repair` replaces these operations; it touches
nothing outside the interpreter, so compiled kernels are unaffected.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl


def to_float(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(values: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns of float32 values, rounded to nearest even; NaN stays NaN."""
    raw = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (raw + np.uint32(0x7FFF) + ((raw >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def repair() -> None:
    """Replace the operations that go wrong. Calling it twice does no harm."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    builder: Any = InterpreterBuilder
    if getattr(builder, "_fastprefix_repaired", False):
        return
    builder._fastprefix_repaired = True
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        _repair_loop_bounds(interpreter)
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, destination = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and destination == tl.float32:
            return TensorHandle(to_float(src.data), tl.float32)
        if source == tl.float32 and destination == tl.bfloat16:
            return TensorHandle(to_bits(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(to_float(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot


def _repair_loop_bounds(interpreter: Any) -> None:
    """Let a scalar, which the interpreter holds as an array [1], count as an integer."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
