"""What holds for every shape, mask and memory layout: hypothesis looks for the one where not."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastprefix_testing.calls import Call, assert_as_concatenated
from fastprefix_testing.problems import Problem, laid_out

NAMES = ("query", "key", "value", "prefix_key", "prefix_value")
CLOSE = {"rtol": 2e-5, "atol": 2e-5}

# Triton's turn comes rarely and with small shapes: its interpreter is slow.
BACKENDS = ["composed"] * 6 + ["reference"] * 4
if importlib.util.find_spec("triton") is not None and os.environ["TRITON_INTERPRET"] == "1":
    BACKENDS.append("triton")


@st.composite
def calls(draw: st.DrawFn, masks: bool = False) -> dict[str, Any]:
    """Fields of a problem, a seed for its numbers, and a backend."""
    backend = draw(st.sampled_from(BACKENDS))
    masks = masks and backend != "triton"
    longest, most = (7, 2) if backend == "triton" else (40, 3)
    Hkv = draw(st.integers(1, most))
    Lq = draw(st.integers(1, longest))
    is_causal = draw(st.booleans())
    Lk = draw(st.integers(Lq if is_causal else 0, 2 * longest))
    call = {
        "backend": backend,
        "seed": draw(st.integers(0, 2**16)),
        "strided": draw(st.sets(st.sampled_from(NAMES))),
        "B": draw(st.integers(1, most)),
        "Hq": Hkv * draw(st.integers(1, 3)),
        "Hkv": Hkv,
        "Lq": Lq,
        "Lk": Lk,
        "P": draw(st.integers(0, 2 * longest)),
        "D": draw(st.integers(1, 33)),
        "is_causal": is_causal,
        "padding": draw(st.sampled_from(["none", "left", "right", "holes", "row"])),
        "scale": draw(st.sampled_from([None, 0.25, 1.0])),
    }
    if masks:
        call["Dv"] = draw(st.integers(1, 33))
        shape = [draw(st.sampled_from([1, n])) for n in (call["B"], call["Hq"], Lq, Lk)]
        call["mask"] = (draw(st.sampled_from(["none", "bool", "additive"])), shape)
    return call


def build(call: dict[str, Any]) -> tuple[Call, str]:
    """The problem of a call, some of its tensors laid out as [B, L, H, D], and the backend."""
    fields = dict(call)
    backend, strided = fields.pop("backend"), fields.pop("strided")
    seed = fields.pop("seed")
    kind, shape = fields.pop("mask", ("none", []))
    problem = Problem(**fields).draw(seed)
    torch.manual_seed(seed)
    if kind == "bool":
        problem.options["attn_mask"] = torch.rand(shape) < 0.7
    elif kind == "additive":
        problem.options["attn_mask"] = torch.randn(shape)
    for name in strided:
        problem.tensors[name] = laid_out(problem.tensors[name], "transposed")
    return problem, backend


def real_tokens(problem: Call) -> Tensor:
    """The padding mask, written out if there is none."""
    mask = problem.options.get("key_padding_mask")
    key = problem.tensors["key"]
    return torch.ones(key.shape[0], key.shape[2], dtype=torch.bool) if mask is None else mask


@settings(max_examples=70)
@given(call=calls(masks=True))
def test_equals_the_concatenation(call):
    problem, backend = build(call)
    assert_as_concatenated(problem, problem.by(backend))


@settings(max_examples=36)
@given(call=calls())
def test_a_row_does_not_depend_on_its_batch_mates(call):
    problem, backend = build(call)
    together = problem.by(backend)
    summed = {name: torch.zeros_like(together[name]) for name in ("prefix_key", "prefix_value")}
    for b in range(call["B"]):
        row = slice(b, b + 1)
        mine = {name: problem.tensors[name][row] for name in ("query", "key", "value")}
        mask = real_tokens(problem)[row]
        alone = problem.changed(key_padding_mask=mask, **mine, grad_out=problem.grad_out[row]).by(
            backend
        )
        for name in ("out", "lse", "query", "key", "value"):
            torch.testing.assert_close(together[name][row], alone[name], **CLOSE, msg=name)
        for name in summed:
            summed[name] += alone[name]
    for name in summed:  # and the prefix's gradient is the sum over the rows
        torch.testing.assert_close(together[name], summed[name], rtol=1e-4, atol=1e-4)


@settings(max_examples=36)
@given(call=calls(), share=st.floats(0, 1))
def test_prefix_tokens_may_as_well_be_ordinary_keys(call, share):
    """Split the prefix, and put its second half in front of every row's keys."""
    problem, backend = build(call)
    B, P = call["B"], call["P"]
    kept = round(share * P)
    moved, mask = {}, real_tokens(problem)
    for name in ("key", "value"):
        prefix = problem.tensors[f"prefix_{name}"]
        tail = prefix[:, kept:].expand(B, -1, -1, -1)
        moved[name] = torch.cat([tail, problem.tensors[name]], dim=2)
        moved[f"prefix_{name}"] = prefix[:, :kept]
    mask = torch.cat([torch.ones(B, P - kept, dtype=torch.bool), mask], dim=1)
    whole, split = problem.by(backend), problem.changed(key_padding_mask=mask, **moved).by(backend)
    for name in ("out", "lse", "query"):
        torch.testing.assert_close(split[name], whole[name], **CLOSE, msg=name)
    for name in ("key", "value"):
        in_front, behind = split[name].tensor_split([P - kept], dim=2)
        torch.testing.assert_close(behind, whole[name], **CLOSE, msg=name)
        prefix = torch.cat([split[f"prefix_{name}"], in_front.sum(0)], dim=1)
        torch.testing.assert_close(prefix, whole[f"prefix_{name}"], rtol=1e-4, atol=1e-4)


@settings(max_examples=36)
@given(call=calls())
def test_log_sum_exps_merge_prefix_and_sequence(call):
    problem, backend = build(call)
    none = {n: problem.tensors[n][:, :0] for n in ("prefix_key", "prefix_value")}
    no_keys = {n: problem.tensors[n][:, :, :0] for n in ("key", "value")}
    whole = problem.by(backend, wanted=())
    sequence = problem.changed(**none).by(backend, wanted=())
    prefix = problem.changed(key_padding_mask=real_tokens(problem)[:, :0], **no_keys)
    prefix.options["is_causal"] = False  # which takes a key per query
    prefix = prefix.by(backend, wanted=())
    lse = torch.logaddexp(sequence["lse"], prefix["lse"])
    out = sum(part["out"] * (part["lse"] - lse).exp()[..., None] for part in (sequence, prefix))
    blind = (lse == float("-inf"))[..., None]
    torch.testing.assert_close(whole["lse"], lse, **CLOSE)
    torch.testing.assert_close(whole["out"], out.masked_fill(blind, 0.0), **CLOSE)


@settings(max_examples=24)
@given(call=calls(), seed=st.integers(0, 99))
def test_the_order_of_prefix_tokens_does_not_matter(call, seed):
    problem, backend = build(call)
    order = torch.randperm(call["P"], generator=torch.Generator().manual_seed(seed))
    shuffled = {n: problem.tensors[n][:, order] for n in ("prefix_key", "prefix_value")}
    before, after = problem.by(backend), problem.changed(**shuffled).by(backend)
    for name in ("out", "lse", "query", "key", "value"):
        torch.testing.assert_close(after[name], before[name], **CLOSE, msg=name)
    for name in shuffled:
        torch.testing.assert_close(after[name], before[name][:, order], rtol=1e-4, atol=1e-4)


@settings(max_examples=24)
@given(call=calls())
def test_padded_keys_may_hold_any_number(call):
    problem, backend = build(call)
    pads = ~real_tokens(problem)[:, None, :, None]
    other = {n: problem.tensors[n].masked_fill(pads, 77.0) for n in ("key", "value")}
    before, after = problem.by(backend), problem.changed(**other).by(backend)
    torch.testing.assert_close(after, before, **CLOSE)
    for name in ("key", "value"):
        assert not (after[name] * pads).any(), f"{name}: a gradient where there is padding"


@settings(max_examples=24)
@given(call=calls())
def test_the_future_does_not_leak(call):
    problem, backend = build({**call, "is_causal": True, "Lk": call["Lq"] + 3})
    newest = {n: problem.tensors[n].clone() for n in ("key", "value")}
    for x in newest.values():
        x[:, :, -1] += 5.0  # seen by the last query only
    before, after = (p.by(backend, ()) for p in (problem, problem.changed(**newest)))
    earlier = slice(0, call["Lq"] - 1)
    for name in ("out", "lse"):
        torch.testing.assert_close(after[name][:, :, earlier], before[name][:, :, earlier], **CLOSE)
