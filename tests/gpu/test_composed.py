"""The composed backend on a device: PyTorch's own kernels, against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastprefix import prefix_attention
from fastprefix.attention.selection import refusal

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INPUTS = ("query", "key", "value", "prefix_key", "prefix_value")
LEARNED = (*INPUTS, "sinks", "prefix_bias")


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """A device that the backend runs on, with flash attention; or a skipped test."""
    if device.type != "cuda":
        pytest.skip("needs a real device")
    why_not = refusal("composed", "cuda", torch.bfloat16, frozenset(), 64)
    if why_not is not None:
        pytest.skip(why_not)
    if torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("PyTorch's flash attention needs compute capability 8.0")
    return device


def solve(backend, tensors, options, dtype):
    """out, lse and the gradients by name; floating-point tensors are cast to `dtype` first."""

    def cast(x):
        floating = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.detach().to(dtype) if floating else x

    arguments = {name: cast(x) for name, x in (tensors | options).items() if name != "grad_out"}
    leaves = {
        name: x.requires_grad_()
        for name, x in arguments.items()
        if name in LEARNED and not (name == "prefix_bias" and x.dim() > 1)
    }
    out, lse = prefix_attention(**arguments, return_lse=True, backend=backend)
    grads = torch.autograd.grad(out, list(leaves.values()), tensors["grad_out"].to(dtype))
    return {"out": out.detach(), "lse": lse} | dict(zip(leaves, grads, strict=True))


def compare(problem, options):
    """Error against float64: twice that of plain maths in the same dtype, and a few roundings."""
    tensors, options = problem.tensors(), {"is_causal": problem.is_causal} | options
    found = solve("composed", tensors, options, problem.dtype)
    plain = solve("reference", tensors, options, problem.dtype)
    for name, exact in solve("reference", tensors, options, torch.float64).items():
        result, expected = found[name].double(), plain[name].double()
        assert result.shape == exact.shape, name
        nothing = exact == -math.inf
        assert torch.equal(result == -math.inf, nothing), f"{name}: -inf in other places"
        result, exact, expected = (x.masked_fill(nothing, 0.0) for x in (result, exact, expected))
        half = name != "lse" and problem.dtype != torch.float32
        # three TF32 products are a float32 product but for its last two bits
        unit = 2 * torch.finfo(problem.dtype).eps if half else 32 * torch.finfo(torch.float).eps
        allowed = 2 * (expected - exact).abs().max() + unit * exact.abs().max().clamp(min=1.0)
        error = (result - exact).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def padded(p, left=True):
    """Rows of none to all real tokens."""
    lengths = torch.linspace(0, p.Lk, p.B, device=p.device).long()
    real = torch.arange(p.Lk, device=p.device)[None, :] < lengths[:, None]
    return real.flip(1) if left else real


def whole_numbers(p, *values):
    return torch.tensor(values, dtype=torch.int32, device=p.device)


def several(p):
    """Three prefixes, one of them empty, and a row without any."""
    return {
        "prefix_lengths": whole_numbers(p, p.P // 3, 0, p.P - p.P // 3),
        "prefix_index": whole_numbers(p, *(row % 4 - 1 for row in range(p.B))),
    }


def sequences(p):
    """Four sequences, one of them empty; the problem has B = 1 and Lq = Lk."""
    return {"cu_seqlens": whole_numbers(p, 0, p.Lq // 3, p.Lq // 3, p.Lq - 1, p.Lq)}


# Name -> the keyword arguments that turn the feature on, for a problem.
FEATURES = {
    "causal": lambda p: {},
    "bidirectional": lambda p: {"is_causal": False},
    "negative scale": lambda p: {"scale": -0.2},
    "scale of 0": lambda p: {"scale": 0.0},
    "left padding": lambda p: {"key_padding_mask": padded(p)},
    "right padding, bidirectional": lambda p: {
        "key_padding_mask": padded(p, left=False),
        "is_causal": False,
    },
    "bool attn_mask": lambda p: {
        "attn_mask": torch.rand(p.B, 1, p.Lq, p.Lk, device=p.device) > 0.3
    },
    "additive attn_mask": lambda p: {
        "attn_mask": torch.randn(p.B, p.Hq, p.Lq, p.Lk, device=p.device)
    },
    "sliding window": lambda p: {"sliding_window": 40},
    "window on both sides": lambda p: {"sliding_window": 40, "is_causal": False},
    "window and left padding": lambda p: {
        "sliding_window": 40,
        "key_padding_mask": padded(p),
    },
    "prefix in window": lambda p: {"sliding_window": 90, "prefix_in_window": True},
    "sinks": lambda p: {"sinks": torch.randn(p.Hq, device=p.device)},
    "prefix bias per head": lambda p: {"prefix_bias": torch.randn(p.Hq, device=p.device)},
    "prefix bias per column": lambda p: {
        "prefix_bias": torch.randn(p.Hq, p.Lq, p.P, device=p.device)
    },
    "several prefixes": several,
    "packed sequences": sequences,
    "packed sequences in a window": lambda p: {**sequences(p), "sliding_window": 20},
    "packed sequences of several prefixes": lambda p: {
        **sequences(p),
        "prefix_lengths": whole_numbers(p, p.P // 2, p.P - p.P // 2),
        "prefix_index": whole_numbers(p, 1, 0, -1, 1),
    },
}


def shape_of(feature):
    return {"B": 1} if feature.startswith("packed sequences") else {}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("feature", FEATURES)
def test_training(cuda, problem, feature, dtype):
    p = problem(**shape_of(feature), dtype=dtype)
    compare(p, FEATURES[feature](p))


@pytest.mark.parametrize("feature", [name for name in FEATURES if not shape_of(name)])
@pytest.mark.parametrize("Lq", [1, 5])
def test_over_a_cache(cuda, problem, feature, Lq):
    p = problem(B=5, Lq=Lq, Lk=203, P=300)
    compare(p, FEATURES[feature](p))


@pytest.mark.parametrize("D", [16, 72, 100, 128, 200, 256, 320])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_head_sizes(cuda, problem, D, dtype):
    compare(problem(D=D, Dv=D, dtype=dtype, Lq=70, Lk=70, P=33), {})


@pytest.mark.parametrize(("Hq", "Hkv"), [(4, 4), (8, 1), (9, 3)])
@pytest.mark.parametrize("P", [0, 1, 64, 1000])
def test_groups_and_prefix_lengths(cuda, problem, Hq, Hkv, P):
    compare(problem(Hq=Hq, Hkv=Hkv, P=P, Dv=32), {})


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_rows_that_cannot_be_loaded_16_bytes_at_a_time(cuda, problem, dtype):
    p = problem(dtype=dtype)
    tensors = p.tensors()
    for name in INPUTS:
        x = tensors[name]
        room = x.new_empty(*x.shape[:-1], x.shape[-1] + 1)
        tensors[name] = room[..., 1:].copy_(x)
    one = prefix_attention(*(tensors[n] for n in INPUTS), is_causal=True, backend="composed")
    contiguous = (tensors[n].contiguous() for n in INPUTS)
    other = prefix_attention(*contiguous, is_causal=True, backend="composed")
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_host_synchronisation(cuda, problem, feature, dtype):
    p = problem(**shape_of(feature), dtype=dtype)
    tensors, options = p.tensors(), {"is_causal": True} | FEATURES[feature](p)
    grad_out = tensors.pop("grad_out")
    inputs = [x.requires_grad_() for x in tensors.values()]

    def step():
        out = prefix_attention(*inputs, **options, backend="composed")
        return torch.autograd.grad(out, inputs, grad_out)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("feature", ["causal", "left padding", "several prefixes"])
def test_cuda_graph_with_changed_inputs(cuda, problem, feature):
    p = problem(Lq=1)
    tensors, options = p.tensors(), FEATURES[feature](p)
    inputs = [tensors[name] for name in INPUTS]

    def attend():
        return prefix_attention(*inputs, **options, is_causal=True, backend="composed")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for x in inputs:
        x.normal_()
    expected = attend()
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_torch_compile_without_graph_breaks(cuda, problem):
    tensors = problem().tensors()
    grad_out = tensors.pop("grad_out")
    inputs = [x.requires_grad_() for x in tensors.values()]

    def function(*x):
        return prefix_attention(*x, is_causal=True, backend="composed")

    expected = function(*inputs)
    out = torch.compile(function, fullgraph=True)(*inputs)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    # flash attention adds the gradient of the queries up in no fixed order
    for one, other in zip(
        torch.autograd.grad(out, inputs, grad_out),
        torch.autograd.grad(expected, inputs, grad_out),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_the_registered_op_is_as_its_fake_says(cuda, problem):
    from fastprefix.attention.op import prefix_attention_op
    from fastprefix.options import Options

    tensors = problem(Lq=20, Lk=20, P=9).tensors()
    inputs = [tensors[name].requires_grad_() for name in INPUTS]
    arguments = (*inputs, *Options(is_causal=True, scale=0.25), "composed")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(prefix_attention_op, arguments, test_utils=tests)


def test_the_prefix_is_never_expanded(cuda, problem):
    """A training step's extra memory is less than half of one copy of the prefix for each row."""
    p = problem(B=64, Hq=8, Hkv=8, Lq=16, Lk=16, P=4096)
    tensors = p.tensors()
    grad_out = tensors.pop("grad_out")
    inputs = [x.requires_grad_() for x in tensors.values()]
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = prefix_attention(*inputs, is_causal=True, backend="composed")
        torch.autograd.grad(out, inputs, grad_out)
        extra = torch.cuda.max_memory_allocated() - before
        del out
    assert extra < 2 * p.B * p.Hkv * p.P * p.D * p.dtype.itemsize / 2
