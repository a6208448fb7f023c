"""The composed backend's calls of PyTorch's CUDA kernels, without a device.

Kernels in float64 maths, with the arguments and the limits of the real ones, take their place on
the CPU. What cannot be seen without a device, whether the real ones do the same, is in tests/gpu.
PyTorch's own shape functions of the real ones run here, on tensors without values: what reads one
raises.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprefix import prefix_attention
from fastprefix.attention.backends import composed
from fastprefix.attention.backends.composed import cuda, kernels, parts
from fastprefix.attention.op import prefix_attention_op
from fastprefix.attention.selection import BACKENDS
from fastprefix.options import INTEGERS, Options
from fastprefix_testing import calls as feature_calls
from fastprefix_testing import cuda_kernels as stand_ins
from fastprefix_testing.calls import assert_as_concatenated, assert_as_reference
from fastprefix_testing.problems import Problem

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FEATURES = sorted(BACKENDS["composed"].at("cuda").features)
SIZES = {
    "prefill": {"Lq": 7, "past": 0, "pad": "left", "lengths": (5, 0, 3)},
    "no padding": {"Lq": 7, "past": 0, "pad": "none", "lengths": (5, 0, 3)},
    "cache": {"Lq": 5, "past": 9, "pad": "none", "lengths": (17,)},
    "decode": {"Lq": 1, "past": 11, "pad": "none", "lengths": (1, 63)},
    "padded decode": {"Lq": 1, "past": 11, "pad": "holes", "lengths": (9,), "is_causal": False},
    "bidirectional": {"Lq": 6, "past": 0, "pad": "row", "lengths": (0,), "is_causal": False},
}


@pytest.fixture(scope="module", autouse=True)
def on_cuda():
    """CUDA's kernels, and stand-ins for what they call, in place of the CPU's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels.KERNELS, "cpu", kernels.KERNELS["cuda"])
        for name, stand_in in stand_ins.STAND_INS.items():
            patch.setattr(cuda, name, stand_in)
        yield


@pytest.fixture
def calls():
    """The names of the kernels that run."""
    stand_ins.CALLS.clear()
    return stand_ins.CALLS


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_feature_is_reference(sizes, dtype, feature):
    assert_as_reference(feature_calls.build(features={feature}, dtype=dtype, **sizes), "composed")


def test_any_combination_is_reference():
    @settings(max_examples=120, suppress_health_check=list(HealthCheck))
    @given(drawn=feature_calls.drawn("composed"), dtype=st.sampled_from(DTYPES))
    def check(drawn, dtype):
        drawn["features"] &= set(FEATURES)
        assert_as_reference(feature_calls.build(**drawn, dtype=dtype), "composed")

    check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 40), (7, 7), (33, 70)])
@pytest.mark.parametrize(
    ("is_causal", "pad", "P", "scale", "heads", "D"),
    [
        (True, "none", 63, None, (4, 2), 64),
        (True, "left", None, 0.3, (3, 1), 80),
        (False, "holes", 1, None, (3, 3), 100),
        (True, "row", 0, None, (4, 2), 80),
        (False, "none", 33, -0.5, (6, 2), 64),
        (True, "none", 20, 0.0, (3, 3), 64),
    ],
)
def test_against_the_concatenation_in_float64(is_causal, pad, P, scale, lengths, heads, D, dtype):
    (Hq, Hkv), (Lq, Lk) = heads, lengths
    problem = Problem(
        Hq=Hq, Hkv=Hkv, Lq=Lq, Lk=Lk, D=D, P=P, dtype=dtype, is_causal=is_causal, padding=pad,
        scale=scale,
    ).draw()  # fmt: skip
    assert_as_concatenated(problem, problem.by("composed"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "Dv"), [(1, 1), (24, 72), (200, 200), (256, 8), (300, 300)])
def test_head_sizes(D, Dv, dtype):
    problem = Problem(D=D, Dv=Dv, dtype=dtype, is_causal=True, Lk=12).draw()
    assert_as_concatenated(problem, problem.by("composed"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_that_16_bytes_cannot_be_loaded_from(dtype):
    """One number before each row, or a row of odd length: both are copied."""
    problem = Problem(dtype=dtype, is_causal=True, D=64, Lk=9).draw()
    for name, x in problem.tensors.items():
        room = x.new_empty(*x.shape[:-1], x.shape[-1] + (1 if name == "key" else 8))
        view = room[..., 1 : 1 + x.shape[-1]]
        view.copy_(x)
        assert not cuda.can_load(view)
        problem.tensors[name] = view
    assert_as_concatenated(problem, problem.by("composed"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_masks_that_are_built_in_parts(dtype, rows, monkeypatch):
    """A mask over several prefixes is built for some rows at a time."""
    monkeypatch.setattr(parts, "_MASK_ELEMENTS", rows * 2 * 8)
    for features in ({"packed prefixes"}, {"packed prefixes", "cu_seqlens"}):
        call = feature_calls.build(features=features, dtype=dtype, lengths=(5, 3), Lq=1, past=3)
        assert_as_reference(call, "composed")


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (set(), "flash"),
        ({"sliding_window", "sinks", "prefix_bias [Hq]"}, "flash"),
        ({"cu_seqlens", "sliding_window"}, "flash"),
        ({"attn_mask"}, "both"),
        ({"packed prefixes"}, "both"),
    ],
)
@pytest.mark.parametrize("past", [0, 9])
def test_which_kernel_runs(features, expected, past, calls):
    """Flash attention wherever no mask is needed; the other kernel alone in float32."""
    feature_calls.build(features=features, dtype=torch.bfloat16, past=past).by("composed")
    flash, efficient = {"flash", "flash backward"}, {"efficient", "efficient backward"}
    assert set(calls) == (flash if expected == "flash" else flash | efficient)
    calls.clear()
    feature_calls.build(features=features, dtype=torch.float32, past=past).by("composed")
    assert set(calls) == efficient


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_are_passed_as_they_lie(dtype, monkeypatch):
    """Neither repeated for their group nor copied for the batch."""
    seen = set()
    for name in ("_flash_forward", "_efficient_forward"):
        op = getattr(cuda, name)

        def recorded(query, key, value, *args, op=op, **kwargs):
            seen.update((key.data_ptr(), value.data_ptr()))
            return op(query, key, value, *args, **kwargs)

        monkeypatch.setattr(cuda, name, recorded)
    problem = Problem(dtype=dtype, is_causal=True).draw()
    problem.by("composed", wanted=())
    given_ = [problem.tensors[name] for name in ("key", "value", "prefix_key", "prefix_value")]
    assert seen == {x.data_ptr() for x in given_}


def test_queries_that_see_no_key():
    """Lk < Lq in a window: the kernel says inf for such a row, where others say -inf."""
    tensors = Problem(B=1, Lq=9, Lk=2, P=0, dtype=torch.bfloat16).draw().tensors
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    found = []
    for backend in ("composed", "reference"):
        out, lse = prefix_attention(**leaves, sliding_window=3, return_lse=True, backend=backend)
        found.append([out, lse, *torch.autograd.grad(out.float().square().sum(), leaves.values())])
    assert (found[0][1] == -math.inf).any()
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=2e-2)


def test_the_registered_op_is_as_its_fake_says():
    tensors = Problem(dtype=torch.bfloat16, is_causal=True).draw().tensors
    inputs = [x.requires_grad_() for x in tensors.values()]
    arguments = (*inputs, *Options(is_causal=True, scale=0.25), "composed")
    torch.library.opcheck(prefix_attention_op, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("feature", [None, *FEATURES])
@pytest.mark.parametrize("sizes", list(SIZES.values())[:4], ids=list(SIZES)[:4])
def test_shapes_of_the_real_kernels_without_reading_a_value(sizes, feature, dtype, monkeypatch):
    """Forward and backward of tensors without values.

    A shape that depends on values, or a value that the host reads, raises.
    """
    for name, op in REAL.items():
        monkeypatch.setattr(cuda, name, op)
    # a tensor without values has no address
    monkeypatch.setattr(cuda, "can_load", lambda x: x.stride(-1) == 1)
    without = kernels.KERNELS["cuda"]._replace(can_load=cuda.can_load)
    monkeypatch.setitem(kernels.KERNELS, "cpu", without)
    call = feature_calls.build(
        features={feature} - {None}, dtype=dtype, **{**sizes, "lengths": (5, 3)}
    )
    given = {n: x.int() if n in INTEGERS else x for n, x in (call.tensors | call.options).items()}
    with FakeTensorMode():
        fake = {
            name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
            if isinstance(x, torch.Tensor)
            else x
            for name, x in given.items()
        }
        five = tuple(fake.pop(name) for name in list(call.tensors)[:5])
        options = Options(scale=0.25, **fake)
        out, lse = composed.forward(*five, options)
        grad_out = torch.empty(call.grad_out.shape, dtype=dtype)
        learned = options.sinks, options.prefix_bias if "prefix_bias" in call.tensors else None
        needs = (True,) * 5 + tuple(x is not None for x in learned)
        grads = composed.backward(grad_out, *five, out, lse, options, needs)
    assert (out.shape, out.dtype) == (call.grad_out.shape, dtype)
    assert (lse.shape, lse.dtype) == (call.grad_out.shape[:-1], torch.float32)
    for grad, x in zip(grads, (*five, *learned), strict=True):
        assert (grad is None) == (x is None)
        assert grad is None or (grad.shape, grad.dtype) == (x.shape, x.dtype)


# What `cuda` calls, looked up again: the fixture above has replaced it there.
REAL = {
    "_flash_forward": torch.ops.aten._flash_attention_forward.default,
    "_flash_backward": torch.ops.aten._flash_attention_backward.default,
    "_efficient_forward": torch.ops.aten._scaled_dot_product_efficient_attention.default,
    "_efficient_backward": torch.ops.aten._scaled_dot_product_efficient_attention_backward.default,
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_ops_take_what_is_passed(name):
    """Every argument of a stand-in is one of the real op's, at its place and with its default."""
    real = {argument.name.rstrip("_"): argument for argument in REAL[name]._schema.arguments}
    stand_in = inspect.signature(stand_ins.STAND_INS[name]).parameters
    assert set(stand_in) <= set(real)
    positional = [a.name.rstrip("_") for a in REAL[name]._schema.arguments if not a.kwarg_only]
    passed = [n for n, p in stand_in.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    names = {"philox_seed": "rng_state", "philox_offset": "unused"}
    assert [names.get(n, n) for n in passed] == [names.get(n, n) for n in positional]
    for argument, parameter in stand_in.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            assert real[argument].kwarg_only
    for extra in set(real) - set(stand_in):
        assert real[extra].has_default_value(), extra
    assert len(REAL[name]._schema.returns) == {
        "_flash_forward": 5, "_flash_backward": 3, "_efficient_forward": 4,
        "_efficient_backward": 4,
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "padded"), [(1, 8), (8, 8), (100, 104), (192, 192), (193, 256), (256, 256), (300, 304)]
)
def test_padded_head_sizes(size, padded):
    assert cuda.head_size(size) == padded
