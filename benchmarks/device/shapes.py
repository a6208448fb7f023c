"""What is timed: the shapes, and the bytes and FLOP that each of them cannot do without."""

from __future__ import annotations

from fastprefix.bench.problem import Shape

# The most important first: what the budget does not allow is left out from the end.
SHAPES = (
    Shape("decode", 32, 32, 8, 1024, 256, flex=True),
    Shape("train", 8, 32, 8, 1024, 512, flex=True),
    Shape("prefill", 8, 32, 8, 1024, 512, flex=True),
    Shape("decode", 8, 32, 8, 1024, 256),
    Shape("decode", 8, 32, 8, 20, 256),
    Shape("train", 8, 32, 8, 32, 512),
    Shape("decode", 128, 32, 8, 4096, 256),
    Shape("decode", 1, 32, 8, 1024, 256),
    Shape("decode", 32, 32, 8, 8192, 256),
    Shape("train", 32, 32, 8, 4096, 128),
    Shape("prefill", 32, 32, 8, 4096, 128),
    Shape("decode", 32, 32, 32, 1024, 256, D=64),
    Shape("train", 8, 12, 12, 64, 1024, D=64),
)
# In Triton's interpreter: only whether every side gives the same.
REDUCED = (
    Shape("decode", 2, 4, 2, 32, 16, D=16, flex=True),
    Shape("prefill", 2, 4, 2, 16, 8, D=16, flex=True),
    Shape("train", 2, 4, 2, 16, 8, D=16),
)


def flop(s: Shape) -> int:
    """Multiplications and additions of the products, what causality hides left out.

    Two products forward and five backward, 2 D for each score in every one.
    """
    own = s.L if s.work == "decode" else (s.L + 1) / 2
    scores = s.B * s.Hq * s.Lq * (s.P + own)
    return round((14 if s.work == "train" else 4) * s.D * scores)


def least_bytes(s: Shape, *, expanded: bool) -> int:
    """Bytes of all operands, each read or written once: forward, and backward when training.

    Args:
        s: the shape.
        expanded: whether each row holds a copy of the prefix.
    """
    queries = s.B * s.Hq * s.Lq * s.D * s.itemsize  # a tensor like the query
    keys = 2 * s.Hkv * s.D * s.itemsize * ((s.B if expanded else 1) * s.P + s.B * s.L)
    forward = 2 * queries + keys
    if s.work != "train":
        return forward
    # backward: query, output and its gradient, keys and values in; their gradients out
    return forward + 4 * queries + 2 * keys
