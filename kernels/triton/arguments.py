"""Groups of kernel arguments. Triton passes a NamedTuple as its fields, one after the other.

A field of None is compiled away. An int field that equals 1 becomes a constant, and the compiler
learns which ones are multiples of 16: Triton has no `do_not_specialize` for fields. A length that
grows with every token of decoding is therefore an argument of its own.

The first groups are arguments of kernels. Tensors, which change with every call, and numbers, which
follow from shapes and options, never share one of them. No two of these groups have a field of the
same name. The other groups are made inside kernels, and only passed to device functions. Name their
fields when you make one: Triton's cache does not see this file, so a kernel compiled before fields
changed places would go on being used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Keys(NamedTuple):
    """Keys and values: of the sequences, and of the prefixes, which lie end to end along P.

    Attributes:
        k: [B, Hkv, Lk, D].
        v: [B, Hkv, Lk, Dv].
        pk: [Hkv, P, D].
        pv: [Hkv, P, Dv].
    """

    k: Any
    v: Any
    pk: Any
    pv: Any


class Masks(NamedTuple):
    """What hides keys, and what is added to scores.

    Attributes:
        pad: [B, Lk] bool, True for real tokens.
        mask: [B, Hq, Lq, Lk], bool (True: attend) or added to the scores of the sequence.
        bias: [Hq] or [Hq, Lq, P], added to the scores of the prefix.
        lengths: [B] int32, how many of the Lk keys are in use.
        spans: [B, 3] int32, where a row's real tokens lie, see `Span`.
    """

    pad: Any
    mask: Any
    bias: Any
    lengths: Any
    spans: Any


class Saved(NamedTuple):
    """What the backward knows of each query row, beside the query.

    Attributes:
        do: [B, Hq, Lq, Dv], gradient of the output.
        lse2: [B, Hq, Lq] float32, log-sum-exp in base 2; infinite for rows that see nothing.
        delta: [B, Hq, Lq] float32, sums of out * do.
    """

    do: Any
    lse2: Any
    delta: Any


class Tables(NamedTuple):
    """Where prefixes, sequences and tiles begin. int32.

    Attributes:
        index: [B], the prefix of each sequence, -1 for none.
        starts: [N + 1], where prefixes begin and the last one ends.
        rank: [B, Lq], the real tokens before each query.
        cu: [M + 1], where packed sequences begin and the last one ends.
        tiles: [tiles, 2], (sequence, tile) of packed sequences.
    """

    index: Any
    starts: Any
    rank: Any
    cu: Any
    tiles: Any


class Parts(NamedTuple):
    """Tiles of several prefixes or packed sequences, for the prefix's gradient. int32.

    Attributes:
        key_tiles: [tiles, 2], (prefix, tile).
        query_tiles: [tiles, 2], (sequence, tile) in the order of the prefixes.
        bounds: [N + 1], where in `query_tiles` each prefix's begin.
    """

    key_tiles: Any
    query_tiles: Any
    bounds: Any


class Strides(NamedTuple):
    """`kn` is the stride of k along n; that of the head dimension is 1. None: it is never read.

    b, h, m and n stand for sequence, head, query and key; in front of them p stands for the
    padding mask, m for the mask, b for the bias, l for the lengths.
    """

    qb: Any = None
    qh: Any = None
    qm: Any = None
    kb: Any = None
    kh: Any = None
    kn: Any = None
    vb: Any = None
    vh: Any = None
    vn: Any = None
    pkh: Any = None
    pkn: Any = None
    pvh: Any = None
    pvn: Any = None
    pb: Any = None
    pn: Any = None
    mb: Any = None
    mh: Any = None
    mm: Any = None
    mn: Any = None
    bh: Any = None
    bm: Any = None
    bn: Any = None
    lb: Any = None
    dob: Any = None
    doh: Any = None
    dom: Any = None


class PrefixSums(NamedTuple):
    """Gradients of the prefix, or partial sums of them.

    Attributes:
        dpk: [splits, Hkv, P, D], None if it is not needed.
        dpv: [splits, Hkv, P, Dv], None if it is not needed.
    """

    dpk: Any
    dpv: Any


class DecodeBuffers(NamedTuple):
    """What the first launch of a decode step reads besides the operands, and what it writes.

    Attributes:
        order: see `BatchTables`; None for one prefix.
        units: the same.
        part_out: [rows, Dv] float32, the normalised results of splits.
        part_lse: [rows] float32, their log-sum-exp (natural logarithm).
    """

    order: Any
    units: Any
    part_out: Any
    part_lse: Any


class Sizes(NamedTuple):
    """Key heads and lengths of a call."""

    Hkv: Any
    Lq: Any
    Lk: Any
    P: Any


class OnePassSizes(NamedTuple):
    """The sizes of one pass over a text that do not grow with every token."""

    Hkv: Any
    Lq: Any
    P: Any


class FixedSizes(NamedTuple):
    """What does not grow with every token of a decode step.

    Attributes:
        Hkv, Lq: as in `Sizes`.
        overlaps: 1 if the merge is launched while the tiles still run, None otherwise.
    """

    Hkv: Any
    Lq: Any
    overlaps: Any


class Scores(NamedTuple):
    """What happens to the product of a query and a key."""

    scale: Any
    softcap: Any


class TileShape(NamedTuple):
    """Compile-time sizes of tiles: heads, the blocks that hold them, rows and keys."""

    HEAD: Any
    HEAD_V: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    BLOCK_M: Any
    BLOCK_N: Any
    PRECISION: Any


class Source(NamedTuple):
    """One source of keys as one program reads it: its prefix, or its sequence.

    Attributes:
        k, v, pad: pointers to its first key.
        mask: [BM, 1], for each row the pointer to its first column of a mask or bias.
        kn, vn, pn, mn: their strides along the keys.
        shift: [BM] or None, added to all scores of a row.
        length: its number of keys.
        column: where it begins in [prefix ; sequence], for dropout.
        first, solid: of its `Span`; None if it has no padding or nobody has looked for its span.
    """

    k: Any
    v: Any
    pad: Any
    mask: Any
    kn: Any
    vn: Any
    pn: Any
    mn: Any
    shift: Any
    length: Any
    column: Any
    first: Any
    solid: Any


class Span(NamedTuple):
    """Where the real tokens of a row of the padding mask lie.

    Attributes:
        first: the first one; Lk if there is none.
        solid: all tokens first .. solid are real. It is `end` unless there are holes.
        end: behind the last one; 0 if there is none.
    """

    first: Any
    solid: Any
    end: Any


class Rows(NamedTuple):
    """A tile of query rows in the backward: tiles [BM, BLOCK_D] and rows [BM], or pointers to them.

    Attributes:
        q, do, lse2, delta: as in `Saved`.
        m: [BM], which rows exist.
    """

    q: Any
    do: Any
    lse2: Any
    delta: Any
    m: Any


class KeyTile(NamedTuple):
    """A tile of keys in registers, the other side of the backward.

    Attributes:
        k: [BN, BLOCK_D].
        v: [BN, BLOCK_DV].
        o: [BN], their offsets from the first key of the tile.
        m: [BN], which keys exist.
    """

    k: Any
    v: Any
    o: Any
    m: Any


class Dropout(NamedTuple):
    """Which weights are dropped, see :func:`~fastprefix.kernels.blocks.kept`; all None for none.

    Attributes:
        seed, dropped, keep: of the call.
        o_query, o_head: what numbers the rows; they broadcast to the tile of scores.
    """

    seed: Any
    dropped: Any
    keep: Any
    o_query: Any
    o_head: Any


class BatchTables(NamedTuple):
    """All tables of a batch, see :mod:`~fastprefix.kernels.tables`. int32; None: nothing reads it.

    Attributes:
        order: [B], for decoding: the batch rows sorted by prefix.
        units: [units, 4], for decoding: of each unit the first packed row, the end of the prefix's
            packed rows, the first key and the end of the keys. Surplus units have no rows.
        rows: [B, 3], for decoding: of each batch row its first packed row counted from the first
            one of its prefix, the first unit of its prefix, and the splits (0: no prefix).
        starts: [N + 1], where prefixes begin and the last one ends.
        forward: [tiles, 2], (sequence, tile) of packed sequences, for the forward.
        dq: [tiles, 2], the same for dQ.
        dkv: [tiles, 2], the same for tiles of keys.
        key_tiles: see `Parts`; so are the next two.
        query_tiles: [tiles, 2].
        bounds: [N + 1].
    """

    order: Any
    units: Any
    rows: Any
    starts: Any
    forward: Any
    dq: Any
    dkv: Any
    key_tiles: Any
    query_tiles: Any
    bounds: Any


class Cut(NamedTuple):
    """How decoding cuts packed prefixes, see `decode_grid.PrefixCut`.

    Attributes:
        packed, rows, keys, shortest: as there.
        parts: how many splits a prefix has at most, or of how many units the table may be longer
            than there are tiles of rows.
    """

    packed: Any
    rows: Any
    keys: Any
    shortest: Any
    parts: Any


class PrefixPart(NamedTuple):
    """Some of the packed prefixes, in registers, while tables are built.

    Attributes:
        o: their numbers.
        key_first, key_end: their keys along P.
        row_first, row_end: their rows in the order of prefixes.
        tiles: tiles of packed rows.
        split, splits: keys per split, and how many splits there are.
        unit_first, unit_end: their units.
        key, unit: how many keys and units come before the next part.
    """

    o: Any
    key_first: Any
    key_end: Any
    row_first: Any
    row_end: Any
    tiles: Any
    split: Any
    splits: Any
    unit_first: Any
    unit_end: Any
    key: Any
    unit: Any


# The strides of each tensor by their fields, but for that of the head dimension.
_STRIDES = {
    "q": ("qb", "qh", "qm"), "k": ("kb", "kh", "kn"), "v": ("vb", "vh", "vn"),
    "pk": ("pkh", "pkn"), "pv": ("pvh", "pvn"), "pad": ("pb", "pn"),
    "mask": ("mb", "mh", "mm", "mn"), "bias": ("bh", "bm", "bn"), "lengths": ("lb",),
    "do": ("dob", "doh", "dom"),
}  # fmt: skip


def strides(**tensors: Tensor | None) -> Strides:
    """The strides of the tensors that a kernel may read, by their names in it.

    Those of None are zeros, so that an option changes no parameter of a kernel but its own; the
    stride of `lengths` is left out, so that the option changes none where it is not used.
    """
    found: dict[str, int] = {}
    for name, tensor in tensors.items():
        if name == "lengths" and tensor is None:
            continue
        fields = _STRIDES[name]
        found.update(dict.fromkeys(fields, 0))
        if tensor is not None:
            found.update(zip(fields, tensor.stride(), strict=False))
    return Strides(**found)


# Of Strides: those of query, keys, values and the output's gradient.
_OPERANDS = tuple(name for x in ("q", "k", "v", "pk", "pv", "do") for name in _STRIDES[x])


def stride_unit(s: Strides) -> int:
    """The :func:`unit_of` the strides of the operands."""
    return unit_of(*[getattr(s, name) or 0 for name in _OPERANDS])


def unit_of(*strides: int) -> int:
    """A power of two, 8 at most, of which all strides are multiples.

    1 if they are multiples of 16. Triton knows those by itself, and nothing of the others: a head
    of 72 would be loaded two bytes at a time.
    """
    together = 0
    for stride in strides:
        together |= stride
    return 1 if together % 16 == 0 else together & -together
