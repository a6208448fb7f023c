"""What only a device shows: synchronisation, CUDA graphs, compilation, memory, the same bits."""

from __future__ import annotations

import pytest
import torch

from fastprefix import prefix_attention

pytestmark = pytest.mark.gpu
INPUTS = ("query", "key", "value", "prefix_key", "prefix_value")


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("needs a real device")
    return device


def inputs_of(p):
    tensors = p.tensors()
    grad_out = tensors.pop("grad_out")
    return [x.requires_grad_() for x in tensors.values()], grad_out


def test_no_host_synchronisation(cuda, problem):
    p = problem()
    inputs, grad_out = inputs_of(p)
    mask = torch.ones(p.B, p.Lk, dtype=torch.bool, device=cuda)

    def step():
        out = prefix_attention(*inputs, key_padding_mask=mask, is_causal=True)
        return torch.autograd.grad(out, inputs, grad_out)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_same_bits_in_every_run(cuda, problem):
    inputs, grad_out = inputs_of(problem(B=16, P=700))
    runs = []
    for _ in range(3):
        out = prefix_attention(*inputs, is_causal=True)
        runs.append([out, *torch.autograd.grad(out, inputs, grad_out)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_cuda_graph(cuda, problem):
    inputs = [x.detach() for x in inputs_of(problem(Lq=1))[0]]
    expected = prefix_attention(*inputs, is_causal=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        prefix_attention(*inputs, is_causal=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prefix_attention(*inputs, is_causal=True)
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_torch_compile_without_graph_breaks(cuda, problem):
    inputs, grad_out = inputs_of(problem())

    def function(*x):
        return prefix_attention(*x, is_causal=True)

    expected = function(*inputs)
    out = torch.compile(function, fullgraph=True)(*inputs)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for a, b in zip(
        torch.autograd.grad(out, inputs, grad_out),
        torch.autograd.grad(expected, inputs, grad_out),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_prefix_is_never_expanded(cuda, problem):
    """Beyond results and gradients, a training step takes less than one copy of the prefix a row.

    lse and delta aside, only the partial sums of the prefix's gradient are allocated, and their
    number is bounded by the device and not by the batch.
    """
    p = problem(B=64, Hq=8, Hkv=8, Lq=16, Lk=16, P=4096)
    inputs, grad_out = inputs_of(p)
    out = prefix_attention(*inputs, is_causal=True)
    torch.autograd.grad(out, inputs, grad_out)
    del out
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = prefix_attention(*inputs, is_causal=True)
    torch.autograd.grad(out, inputs, grad_out)
    extra = torch.cuda.max_memory_allocated() - before
    expanded = 2 * p.B * p.Hkv * p.P * p.D * p.dtype.itemsize
    assert extra < expanded / 2


def test_offsets_beyond_32_bits(cuda):
    """B x H x L x D of 2^31 and more: the last rows come out right."""
    free, _ = torch.cuda.mem_get_info()
    if free < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    B, H, L, D = 65, 16, 16384, 128  # 2.2e9 elements, 4.4 GB
    query = torch.randn(B, H, L, D, device=cuda, dtype=torch.bfloat16)
    key, value = (torch.randn(1, 1, 1, D, device=cuda, dtype=torch.bfloat16) for _ in "kv")
    key, value = (x.expand(B, 1, 8, D).contiguous() for x in (key, value))
    prefix = torch.randn(2, 1, 40, D, device=cuda, dtype=torch.bfloat16)
    out = prefix_attention(query, key, value, prefix[0], prefix[1])
    for b in (0, B - 1):
        one = prefix_attention(
            query[b : b + 1, :, -64:], key[b : b + 1], value[b : b + 1], prefix[0], prefix[1]
        )
        torch.testing.assert_close(out[b : b + 1, :, -64:], one, rtol=0, atol=2e-2)


def test_tuning_finds_a_tile_no_slower_than_the_tables(cuda):
    from fastprefix.kernels import launch, tilings
    from fastprefix.kernels.tuning import tune

    found = tune.tune(tune.TimedProblem(length=512, prefix=256), "forward", cuda)
    assert found.tried > 1
    assert found.best_ms <= found.table_ms
    assert found.table in [
        row[1] for row in tilings.TILES[launch.target_of(cuda).family]["forward"]
    ]
