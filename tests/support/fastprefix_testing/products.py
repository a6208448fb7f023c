"""Products of Triton's interpreter whose bits do not depend on where a row lies in a tile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np


@contextlib.contextmanager
def rounded_once() -> Iterator[None]:
    """Products of float32 are computed in float64 and rounded once.

    A GPU computes every row of a tile alike. NumPy does not on every processor: the rows at the end
    of a matrix may be summed in another order than the others.
    """
    from triton.runtime import interpreter

    matmul = np.matmul

    def product(a: Any, b: Any, dtype: Any) -> Any:
        return matmul(a, b, dtype=np.float64).astype(dtype)

    class Numpy:
        """NumPy with another product."""

        def __getattr__(self, name: str) -> Any:
            return product if name == "matmul" else getattr(np, name)

    with mock.patch.object(interpreter, "np", Numpy()):
        yield
