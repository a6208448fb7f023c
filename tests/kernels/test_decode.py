"""Decode in two launches: against float64, bit for bit across batches, its plan."""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
from dataclasses import dataclass

import pytest
import torch
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastprefix.options import Options

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETER, reason="needs Triton's interpreter")
if INTERPRETER:
    from fastprefix.kernels import (
        decode,
        decode_grid,
        decode_kernels,
        decode_tables,
        launch,
        launch_forward,
        tilings,
    )
    from fastprefix.kernels.decode import decode_forward

HALF = [torch.bfloat16, torch.float16]
HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (3, 1)}


@dataclass(frozen=True)
class Case:
    """One call. `lengths` None: one prefix of P tokens shared by all. padding as in conftest."""

    B: int = 2
    Hq: int = 2
    Hkv: int = 1
    Lq: int = 1
    Lk: int = 40
    P: int = 50
    lengths: tuple[int, ...] | None = None
    index: tuple[int, ...] | None = None
    D: int = 16
    Dv: int = 16
    dtype: torch.dtype = torch.float32
    is_causal: bool = True
    padding: str = "none"
    scale: float = 0.3
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    prefix_bias: bool = False
    layout: str = "dense"

    def operands(self) -> tuple[list[Tensor], dict]:
        """The five inputs and all keywords."""
        P = self.P if self.lengths is None else sum(self.lengths)
        shapes = [
            (self.B, self.Hq, self.Lq, self.D),
            (self.B, self.Hkv, self.Lk, self.D),
            (self.B, self.Hkv, self.Lk, self.Dv),
            (self.Hkv, P, self.D),
            (self.Hkv, P, self.Dv),
        ]
        rule = {"is_causal": self.is_causal, "scale": self.scale, "key_padding_mask": self.mask()}
        rule |= {"sliding_window": self.sliding_window, "softcap": self.softcap}
        if self.lengths is not None:
            index = self.index
            if index is None:
                index = torch.randint(-1, len(self.lengths), (self.B,))
            rule["prefix_index"] = torch.as_tensor(index, dtype=torch.int32)
            rule["prefix_lengths"] = torch.tensor(self.lengths, dtype=torch.int32)
        for name in ("sinks", "prefix_bias"):
            rule[name] = torch.randn(self.Hq).to(self.dtype) if getattr(self, name) else None
        return [arrange(shape, self.dtype, self.layout) for shape in shapes], rule

    def mask(self) -> Tensor | None:
        """The key padding mask [B, Lk], True = real."""
        position = torch.arange(self.Lk)[None, :]
        length = torch.randint(0, self.Lk + 1, (self.B, 1))
        mask = torch.rand(self.B, self.Lk) > 0.4
        if self.padding == "row":
            mask[0] = False
        return {"none": None, "left": position >= length, "right": position < length}.get(
            self.padding, mask
        )


def arrange(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """Random numbers: dense; with positions before heads; inside a sea of NaN; strided."""
    values = torch.randn(shape, dtype=torch.float64).to(dtype)
    if layout == "transposed":
        return values.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "strided":
        return torch.stack([values, values], dim=-1).flatten(-2)[..., 1::2]
    if layout == "islands":
        sea = torch.full([n + 3 for n in shape], float("nan"), dtype=dtype)
        return sea[tuple(slice(2, 2 + n) for n in shape)].copy_(values)
    return values


def concatenated(inputs: list[Tensor], rule: dict, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The contract in plain PyTorch: every row's prefix concatenated to its sequence."""
    query, key, value, prefix_key, prefix_value = (x.to(dtype) for x in inputs)
    (B, Hq, Lq, _), Lk = query.shape, key.shape[2]
    group = Hq // key.shape[1]
    outs, lses = [], []
    for b in range(B):
        lo, hi = 0, prefix_key.shape[1]
        if rule.get("prefix_index") is not None:
            n, lengths = int(rule["prefix_index"][b]), rule["prefix_lengths"].tolist()
            lo, hi = (0, 0) if n < 0 else (sum(lengths[:n]), sum(lengths[: n + 1]))
        k = torch.cat([prefix_key[:, lo:hi], key[b]], 1).repeat_interleave(group, 0)
        v = torch.cat([prefix_value[:, lo:hi], value[b]], 1).repeat_interleave(group, 0)
        scores = query[b] @ k.transpose(1, 2) * rule["scale"]
        if rule["softcap"] is not None:
            scores = rule["softcap"] * torch.tanh(scores / rule["softcap"])
        seen = torch.ones(Hq, Lq, hi - lo + Lk, dtype=torch.bool)
        position, at = torch.arange(Lq)[:, None] + Lk - Lq, torch.arange(Lk)[None, :]
        if rule["is_causal"]:
            seen[..., hi - lo :] &= at <= position
        if rule["sliding_window"] is not None:
            seen[..., hi - lo :] &= (position - at).abs() < rule["sliding_window"]
        if rule["key_padding_mask"] is not None:
            seen[..., hi - lo :] &= rule["key_padding_mask"][b]
        if rule["prefix_bias"] is not None:
            scores[..., : hi - lo] += rule["prefix_bias"].to(dtype)[:, None, None]
            seen[..., : hi - lo] &= (rule["prefix_bias"] > -1e30)[:, None, None]
        scores = scores.masked_fill(~seen, float("-inf"))
        with_sink = scores
        if rule["sinks"] is not None:
            sink = rule["sinks"].to(dtype)[:, None, None].expand(Hq, Lq, 1)
            with_sink = torch.cat([scores, sink], 2)
        lse = (
            with_sink.logsumexp(2) if with_sink.shape[2] else scores.new_full((Hq, Lq), -torch.inf)
        )
        weights = torch.exp(scores - lse[..., None]).nan_to_num(0.0)
        outs.append(weights @ v)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


def judge(found: tuple[Tensor, Tensor], inputs: list[Tensor], rule: dict) -> None:
    """The rule of conftest's `agree`: twice the error of plain PyTorch, plus a few roundings."""
    dtype = inputs[0].dtype
    truth, plain = (concatenated(inputs, rule, d) for d in (torch.float64, dtype))
    for name, x, t, p in zip(("out", "lse"), found, truth, plain, strict=True):
        assert x.shape == t.shape, name
        assert x.dtype == (torch.float32 if name == "lse" else dtype), name
        nothing = t.isinf()
        assert torch.equal(x.isinf(), nothing), name
        if not t.numel() or nothing.all():
            continue
        x, t, p = (y.double().masked_fill(nothing, 0.0) for y in (x, t, p))
        half = name != "lse" and dtype != torch.float32
        unit = 2 * torch.finfo(dtype).eps if half else 8 * torch.finfo(torch.float).eps
        allowed = 2 * (p - t).abs().max() + unit * t.abs().max().clamp(min=1.0)
        error = (x - t).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def agree(case: Case, **options: bool) -> None:
    inputs, rule = case.operands()
    judge(decode_forward(*inputs, Options(**rule, **options)), inputs, rule)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_heads_and_dtypes(heads, dtype):
    Hq, Hkv = HEADS[heads]
    agree(Case(Hq=Hq, Hkv=Hkv, dtype=dtype, D=32, Dv=32))


@interpreted
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("Lq", [1, 3, 16])
@pytest.mark.parametrize("lengths", [None, (33, 0, 1, 40)], ids=["shared", "packed"])
def test_query_lengths(Lq, lengths, is_causal):
    agree(Case(Lq=Lq, lengths=lengths, is_causal=is_causal))


@interpreted
def test_more_rows_than_a_sequence_tile():
    agree(Case(B=2, Hq=5, Hkv=1, Lq=16, Lk=70, lengths=(40, 20), index=(1, 0)))


@interpreted
@pytest.mark.parametrize(
    "index",
    [(3, 0, 3, 2, 1), (-1, 3, -1, 0, 0), (2,) * 5, (-1,) * 5, (1,) * 5],
    ids=str,
)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_packed_prefixes(index, batch_invariant):
    case = Case(B=5, Lk=9, lengths=(33, 0, 1, 150, 40), index=index)
    agree(case, batch_invariant=batch_invariant)


@interpreted
@pytest.mark.parametrize("P", [0, 1, 64, 300])
@pytest.mark.parametrize("Lk", [0, 1, 64, 200])
def test_prefix_and_sequence_lengths(P, Lk):
    agree(Case(B=1, P=P, Lk=Lk))


@interpreted
@pytest.mark.parametrize("padding", ["left", "right", "holes", "row"])
@pytest.mark.parametrize(("batch_invariant", "P"), [(False, 5), (True, 0)])
def test_padding(padding, P, batch_invariant, monkeypatch):
    monkeypatch.setattr(decode_kernels, "SCAN", tl.constexpr(32))  # several steps of a scan
    case = Case(B=3, Lq=3, Lk=140, P=P, padding=padding)
    agree(case, batch_invariant=batch_invariant)


@interpreted
@pytest.mark.parametrize(
    ("is_causal", "padding", "batch_invariant"),
    # any two of the three in every combination
    [(True, "none", False), (True, "left", True), (False, "left", False), (False, "none", True)],
)
@pytest.mark.parametrize("window", [1, 20, 75, 2**31 - 1])
def test_sliding_window(window, is_causal, padding, batch_invariant):
    case = Case(Lq=3, Lk=150, P=0, padding=padding, sliding_window=window, Hq=2)
    case = dataclasses.replace(case, is_causal=is_causal, Hkv=1)
    agree(case, batch_invariant=batch_invariant)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature", ["softcap", "sinks", "prefix_bias", "all"])
def test_features(feature, dtype):
    given = {"softcap": 2.0, "sinks": True, "prefix_bias": True}
    chosen = given if feature == "all" else {feature: given[feature]}
    agree(Case(Lq=2, lengths=(40, 0, 9), index=(0, -1), dtype=dtype, padding="row", **chosen))


@interpreted
def test_bias_that_hides_the_prefix():
    inputs, rule = Case(prefix_bias=True, padding="row", sinks=True).operands()
    rule["prefix_bias"][1::2] = -1e30
    out, lse = decode_forward(*inputs, Options(**rule))
    judge((out, lse), inputs, rule)
    # Row 0 has only padding: where the prefix is hidden, the sink is all there is.
    assert not out[0, 1::2].any()
    torch.testing.assert_close(lse[0, 1::2, 0], rule["sinks"][1::2])


@interpreted
@pytest.mark.parametrize("sizes", [(1, 3), (72, 40), (80, 128), (192, 128)], ids=str)
def test_head_sizes(sizes):
    agree(Case(B=2, Lk=40, P=33, D=sizes[0], Dv=sizes[1], dtype=torch.float16))


@interpreted
@pytest.mark.parametrize("layout", ["transposed", "strided", "islands"])
def test_layouts(layout):
    agree(Case(D=24, Dv=40, layout=layout, padding="right", lengths=(37, 21)))


@interpreted
@pytest.mark.parametrize("scale", [-0.5, 0.0, 30.0])
def test_scales(scale):
    agree(Case(scale=scale, padding="holes", dtype=torch.bfloat16))


@interpreted
@pytest.mark.parametrize("empty", ["B", "Lq"])
def test_no_queries(empty):
    inputs, rule = Case(**{empty: 0}).operands()
    out, lse = decode_forward(*inputs, Options(**rule))
    assert out.shape == inputs[0].shape
    assert lse.shape == inputs[0].shape[:3]


@interpreted
@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_prefixes_without_a_token(lengths):
    agree(Case(lengths=lengths, index=(-1, -1)))


@interpreted
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_problems(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    B, (Hkv, group) = draw(st.integers(1, 3)), draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]))
    lengths = draw(st.none() | st.lists(st.integers(0, 50), max_size=4).map(tuple))
    case = Case(
        B=B,
        Hq=Hkv * group,
        Hkv=Hkv,
        Lq=draw(st.integers(1, 16)),
        Lk=draw(st.integers(0, 80)),
        P=draw(st.integers(0, 80)),
        lengths=lengths,
        D=draw(st.sampled_from([3, 16, 24])),
        Dv=draw(st.sampled_from([5, 16, 40])),
        dtype=draw(st.sampled_from([torch.float32, *HALF])),
        is_causal=draw(st.booleans()),
        padding=draw(st.sampled_from(["none", "left", "right", "holes", "row"])),
        sliding_window=draw(st.none() | st.integers(1, 100)),
        softcap=draw(st.sampled_from([None, 1.5])),
        sinks=draw(st.booleans()),
        prefix_bias=draw(st.booleans()),
        layout=draw(st.sampled_from(["dense", "transposed", "islands"])),
    )
    agree(case, batch_invariant=draw(st.booleans()))


@interpreted
@pytest.mark.parametrize("lengths", [None, (40, 0, 100, 7)], ids=["shared", "packed"])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_every_output_element_is_written_and_nothing_else(poisoned, lengths, batch_invariant):
    case = Case(Hq=3, Hkv=1, Lq=3, Lk=90, D=24, Dv=40, lengths=lengths, layout="islands")
    case = dataclasses.replace(case, sliding_window=50, padding="left")
    inputs, rule = case.operands()
    buffers = [x._base for x in inputs]
    before = [x.clone() for x in buffers]
    out, lse = decode_forward(*inputs, Options(**rule, batch_invariant=batch_invariant))
    assert not out.isnan().any()
    assert not lse.isnan().any()
    assert len(poisoned()) >= 4
    for buffer, copy in zip(buffers, before, strict=True):
        assert torch.equal(buffer.nan_to_num(7.0), copy.nan_to_num(7.0))


@interpreted
def test_mask_neighbours_are_not_read():
    inputs, rule = Case(padding="holes", Lk=70).operands()
    results = []
    for sea in (False, True):
        around = torch.full((4, 140), sea)
        mask = around[1:-1, 3:73].copy_(rule["key_padding_mask"])
        results += [decode_forward(*inputs, Options(**rule | {"key_padding_mask": mask}))]
    assert torch.equal(results[0][0], results[1][0])


@interpreted
def test_wrong_tables_are_read_within_bounds(poisoned):
    # Only a host read could refuse these; the kernels must not stray because of them.
    inputs, rule = Case(B=3, lengths=(20, 30), layout="islands").operands()
    rule["prefix_lengths"] = torch.tensor([20, 1000], dtype=torch.int32)
    rule["prefix_index"] = torch.tensor([1, 7, -5], dtype=torch.int32)
    out, _ = decode_forward(*inputs, Options(**rule))
    assert not out.isnan().any()
    poisoned()


@interpreted
@pytest.mark.parametrize(
    ("dtype", "window"), [(torch.float32, None), (torch.bfloat16, 30)], ids=str
)
def test_rows_do_not_depend_on_their_batch_mates(dtype, window):
    lengths, reals, index = (150, 0, 40), (5, 90, 64, 33), (0, 2, -1, 0)
    case = Case(B=4, Hq=3, Hkv=1, Lq=2, Lk=90, lengths=lengths, index=index, dtype=dtype)
    inputs, rule = dataclasses.replace(case, sliding_window=window).operands()
    results = {}
    for batch in ((0,), (1,), (2,), (3,), (3, 2, 1, 0), (2, 2, 3, 0, 0, 0, 0, 0)):
        longest = max(reals[b] for b in batch)
        rows = torch.tensor(batch)
        query, key, value = (x[rows] for x in inputs[:3])
        # Left padded to the longest of the batch, as generate() does.
        key, value = key[:, :, -longest:], value[:, :, -longest:]
        mask = torch.arange(longest) >= longest - torch.tensor(reals)[rows, None]
        chosen = rule | {"prefix_index": rule["prefix_index"][rows], "key_padding_mask": mask}
        out, lse = decode_forward(
            query, key, value, *inputs[3:], Options(**chosen, batch_invariant=True)
        )  # fmt: skip
        for i, b in enumerate(batch):
            first_out, first_lse = results.setdefault(b, (out[i], lse[i]))
            assert torch.equal(out[i], first_out), (batch, b)
            assert torch.equal(lse[i], first_lse), (batch, b)


@interpreted
def test_a_shared_prefix_gives_the_bits_of_a_packed_one():
    inputs, rule = Case(P=150).operands()
    packed = {"prefix_index": torch.zeros(2, dtype=torch.int32)}
    packed["prefix_lengths"] = torch.tensor([150], dtype=torch.int32)
    one = decode_forward(*inputs, Options(**rule, batch_invariant=True))
    other = decode_forward(*inputs, Options(**rule, **packed, batch_invariant=True))
    assert torch.equal(one[0], other[0])


class Operators(TorchDispatchMode):
    """The operators that run, and the shapes of the buffers that they create."""

    def __init__(self):
        super().__init__()
        self.names, self.shapes = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        if "empty" in str(function):
            self.shapes.append(tuple(result.shape))
        return result


@interpreted
def test_no_buffer_grows_with_the_prefix():
    seen = []
    for P in (200, 300):
        inputs, rule = Case(B=10, Hq=8, Hkv=1, Lk=8, P=P).operands()
        with Operators() as operators:
            decode_forward(*inputs, Options(**rule))
        seen.append({s for s in operators.shapes if s != (0,)})  # the interpreter's own
    assert seen[0] == seen[1]
    # 80 rows are 3 tiles of 32; 2 * 4 stand-in multiprocessors allow 2 splits of each, and every
    # sequence has one. Out, lse, and one partial row and lse for every row and split.
    rows = 3 * 2 * 32 + 10 * 8
    assert seen[0] == {(10, 8, 1, 16), (10, 8, 1), (rows, 16), (rows,)}


def hopper() -> tilings.Target:
    return tilings.Target("hopper", 132)


def shape(**changes: object) -> decode_grid.DecodeShape:
    base = decode_grid.DecodeShape(
        B=32, Hq=32, Hkv=8, Lq=1, Lk=512, P=2048, N=None, D=128, Dv=128,
        dtype=torch.bfloat16, sliding_window=None, batch_invariant=False,
    )  # fmt: skip
    return base._replace(**changes)


@interpreted
def test_partials_are_small():
    for P in (2048, 1 << 17):
        grid = decode_grid.grid_of(shape(P=P, Lk=8), hopper())
        # At most a partial per row and split: WAVES tiles per multiprocessor, and one per row.
        rows = (2 * 132 + 8) * grid.tile.rows + 32 * 32
        assert grid.partial_rows <= rows
        assert decode_grid.partial_bytes(grid, 128) <= rows * 129 * 4


@interpreted
@settings(max_examples=80)
@given(data=st.data())
def test_tables_cover_every_row_and_key_once(data):
    draw = data.draw
    lengths = draw(st.lists(st.integers(0, 3000), min_size=1, max_size=6))
    index = draw(st.lists(st.integers(-1, len(lengths) - 1), min_size=1, max_size=70))
    Lq, group = draw(st.integers(1, 16)), draw(st.sampled_from([1, 4, 7]))
    P, target = sum(lengths), draw(st.sampled_from([hopper(), tilings.Target("interpreter", 4)]))
    chosen = shape(
        B=len(index), Hq=2 * group, Hkv=2, Lq=Lq, P=P, N=len(lengths),
        batch_invariant=draw(st.booleans()),
    )  # fmt: skip
    tensors = torch.tensor(index), torch.tensor(lengths)
    plan = decode.decode_plan(chosen, target, *tensors, cached=False)
    if plan.tables is None:
        assert P == 0
        return
    cut, packed = plan.grid.prefix, group * Lq
    order, units, rows = (
        t.tolist() for t in (plan.tables.order, plan.tables.units, plan.tables.rows)
    )
    assert len(units) == cut.units
    assert [index[b] for b in order] == sorted(index)
    real = [u for u in units if u[0] < u[1]]
    for row, _, lo, hi in real:
        assert 0 <= lo < hi <= P
        assert (lo - sum(lengths[: index[order[row // packed]]])) % cut.keys == 0
    for b, n in enumerate(index):
        first, i_u, splits = rows[b]
        if n < 0:
            assert splits == 0
            continue
        begin = sum(lengths[:n])
        for r in {0, packed - 1}:
            at = begin
            for split in range(splits):
                row, row_end, lo, hi = units[i_u + (first + r) // cut.rows * splits + split]
                own = row + (first + r) % cut.rows
                assert own < row_end
                assert order[own // packed] == b
                assert own % packed == r
                assert lo == at
                at = hi
            assert at == begin + lengths[n]


@interpreted
def test_a_plan_reads_nothing_back():
    plan, index, lengths = shape(B=3, P=70, N=2), torch.tensor([1, 0, -1]), torch.tensor([30, 40])
    with Operators() as operators:
        decode.decode_plan(plan, hopper(), index, lengths, cached=False)
    reads = {"_local_scalar_dense", "item", "nonzero", "bincount", "masked_select", "_unique2"}
    assert operators.names
    assert not reads & set(operators.names)
    with Operators() as operators:
        decode.decode_plan(plan._replace(N=None), hopper(), None, None)
    assert not operators.names


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list:
    """One entry for every call of build_tables, with a cache of its own."""
    calls, build = [], decode_tables.build_tables

    def counted(*arguments):
        calls.append(None)
        return build(*arguments)

    monkeypatch.setattr(decode_tables, "build_tables", counted)
    monkeypatch.setattr(decode_tables, "CACHE", decode_tables.TableCache())
    return calls


@interpreted
def test_one_build_serves_all_layers_and_steps(builds):
    case = Case(B=2, Hq=1, Hkv=1, Lk=3, lengths=(5, 9), index=(1, 0))
    inputs, rule = case.operands()
    longer, _ = dataclasses.replace(case, Lk=4).operands()
    with launch.collected(launch.target_of(inputs[0].device)) as steps:
        for _ in range(30):
            decode_forward(*inputs, Options(**rule))
            decode_forward(*longer, Options(**rule))
    assert len(steps) == 30 * 2 * 2
    assert len(builds) == 1
    rule["prefix_index"].copy_(torch.tensor([0, -1]))
    for _ in range(2):
        found = decode_forward(*inputs, Options(**rule))
        judge(found, inputs, rule)
    assert len(builds) == 2


@interpreted
def test_tables_go_with_their_tensors(builds):
    index, lengths = torch.tensor([0, 1]), torch.tensor([5, 9])
    arguments = shape(B=2, P=14, N=2), hopper()
    decode.decode_plan(*arguments, index, lengths)
    assert len(decode_tables.CACHE) == 1
    del index
    gc.collect()
    assert len(decode_tables.CACHE) == 0
    for _ in range(100):
        kept = torch.tensor([1, 0])
        decode.decode_plan(*arguments, kept, lengths)
    assert len(decode_tables.CACHE) == 1
    assert len(builds) == 101
    many = [torch.tensor([1, 0]) for _ in range(100)]
    for kept in many:
        decode.decode_plan(*arguments, kept, lengths)
    assert len(decode_tables.CACHE) == decode_tables.TableCache.SIZE


@interpreted
def test_inference_tensors_are_not_cached(builds):
    with torch.inference_mode():
        index, lengths = torch.tensor([0, 1]), torch.tensor([5, 9])
        for _ in range(2):
            decode.decode_plan(shape(B=2, P=14, N=2), hopper(), index, lengths)
    assert len(builds) == 2


@interpreted
def test_changes_inside_inference_mode_are_seen(builds):
    index, lengths = torch.tensor([0, 1]), torch.tensor([5, 9])
    arguments = shape(B=2, P=14, N=2), hopper()
    with torch.inference_mode():
        decode.decode_plan(*arguments, index, lengths)
        index.copy_(torch.tensor([1, 0]))
        plan = decode.decode_plan(*arguments, index, lengths)
    assert len(builds) == 2
    assert plan.tables.order.tolist() == [1, 0]


@interpreted
def test_threads_share_one_build(builds):
    index, lengths = torch.tensor([0, 1]), torch.tensor([5, 9])
    barrier, found = threading.Barrier(8), []

    def work():
        barrier.wait()
        found.append(decode.decode_plan(shape(B=2, P=14, N=2), hopper(), index, lengths))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len({id(plan.tables) for plan in found}) == 1


@interpreted
def test_explicit_plan(builds):
    inputs, rule = Case(B=2, lengths=(5, 9), index=(1, 0)).operands()
    tensors = rule["prefix_index"], rule["prefix_lengths"]
    own = decode_grid.shape_of(*inputs[:4], tensors[1], None, False)
    target = launch.target_of(inputs[0].device)
    plan = decode.decode_plan(own, target, *tensors, cached=False)
    judge(decode_forward(*inputs, Options(**rule), plan=plan), inputs, rule)
    assert len(builds) == 1
    with pytest.raises(ValueError, match="plan: got one for"):
        decode_forward(*inputs, Options(**rule), plan=dataclasses.replace(plan, shape=shape()))


@interpreted
@pytest.mark.parametrize(
    ("changes", "pays"),
    [
        ({"P": 20, "B": 8, "Lk": 60}, False),
        ({"P": 0, "B": 256, "Lk": 300}, False),
        ({"P": 64, "B": 1, "Lk": 64}, False),
        ({"P": 2048, "B": 32}, True),
        ({"P": 2048, "B": 1}, True),  # one pass would leave most multiprocessors idle
        ({"P": 128, "B": 512, "Lk": 64}, True),
        ({"P": 0, "B": 1, "Lk": 8192}, True),
        ({"P": 20, "B": 1, "Lk": 60, "batch_invariant": True}, True),
        ({"B": 0}, False),
    ],
    ids=str,
)
def test_where_two_phases_pay(changes, pays):
    assert decode_grid.two_phase_pays(shape(**changes), hopper()) is pays


@interpreted
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 4, 17, 8)}, "query: got Lq = 17, decode takes at most 16"),
        ({"attn_mask": torch.zeros(2, 1, 1, 7)}, "attn_mask: decode takes none"),
        ({"dropout_p": 0.1, "dropout_seed": torch.zeros(1, dtype=torch.int64)}, "dropout_p: got 0"),
        ({"sliding_window": 3, "prefix_in_window": True}, "prefix_in_window: got True"),
        ({"prefix_bias": torch.zeros(4, 1, 3)}, r"prefix_bias: got shape \[4, 1, 3\]"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_left_to_the_one_pass_kernel(changes, message):
    operands = operands_that_fit(**changes)
    invariant = operands | {"options": operands["options"]._replace(batch_invariant=True)}
    with pytest.raises(ValueError, match=message):
        decode_forward(**operands)
    launch_forward(**operands)
    if "dropout_p" in changes:
        with pytest.raises(ValueError, match="batch_invariant does not go with dropout_p"):
            launch_forward(**invariant)
        return
    launch_forward(**invariant)
    real = torch.ones(2, 7, dtype=torch.bool)
    invariant["options"] = invariant["options"]._replace(key_padding_mask=real)
    message = "batch_invariant: key_padding_mask for decode alone; " + message
    with pytest.raises(ValueError, match=message):
        launch_forward(**invariant)


def operands_that_fit(**changes) -> dict:
    """The arguments of a call, by name: options, too."""
    operands = {
        "query": torch.zeros(2, 4, 1, 8),
        "key": torch.zeros(2, 2, 7, 8),
        "value": torch.zeros(2, 2, 7, 8),
        "prefix_key": torch.zeros(2, 3, 8),
        "prefix_value": torch.zeros(2, 3, 8),
    }
    options = {name: value for name, value in changes.items() if name not in operands}
    operands |= {name: value for name, value in changes.items() if name in operands}
    return {**operands, "options": Options(is_causal=False, scale=1.0, **options)}


@interpreted
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 3, 1, 8)}, "not a multiple of 2 key heads"),
        ({"key": torch.zeros(2, 2, 9, 8)}, "value has shape"),
        ({"sinks": torch.zeros(3)}, "sinks must be float32"),
        ({"sliding_window": 0}, "sliding_window: got 0"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_operands_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        decode_forward(**operands_that_fit(**changes))
