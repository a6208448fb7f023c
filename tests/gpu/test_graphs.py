"""CUDA graphs: captured once, replayed with other inputs; several of them; changes in place."""

from __future__ import annotations

import pytest
import torch

from fastprefix import prefix_attention

pytestmark = pytest.mark.gpu


def packed(p):
    """Three prefixes, and a row without any."""
    lengths = [p.P // 2, p.P // 4, p.P - p.P // 2 - p.P // 4]
    index = [row % 4 - 1 for row in range(p.B)]
    return {
        "prefix_lengths": torch.tensor(lengths, dtype=torch.int32, device=p.device),
        "prefix_index": torch.tensor(index, dtype=torch.int32, device=p.device),
    }


def captured(function):
    """A graph of the call, and the tensors that its replays fill."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


def call_of(p, options, training=False):
    """A function of no arguments, and all its tensors, which may change in place."""
    tensors = p.tensors()
    grad_out = tensors.pop("grad_out")
    inputs = [x.requires_grad_(training) for x in tensors.values()]

    def run():
        out, lse = prefix_attention(*inputs, is_causal=True, return_lse=True, **options)
        if not training:
            return [out, lse]
        return [out, lse, *torch.autograd.grad(out, inputs, grad_out)]

    return run, [*inputs, grad_out]


def change(tensors):
    with torch.no_grad():
        for x in tensors:
            x.copy_(torch.randn_like(x))


def same_bits(found, expected):
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


SHAPES = {
    "decode": {"B": 5, "Lq": 1, "Lk": 200, "P": 300},
    "prefill": {},
    "train": {},
}


@pytest.mark.parametrize("prefixes", ["one prefix", "several prefixes"])
@pytest.mark.parametrize("work", SHAPES)
def test_a_replay_reads_the_new_inputs(cuda, problem, work, prefixes):
    p = problem(**SHAPES[work])
    options = packed(p) if prefixes == "several prefixes" else {}
    run, tensors = call_of(p, options, training=work == "train")
    graph, outputs = captured(run)
    for _ in range(2):
        change(tensors)
        if options:
            options["prefix_index"].copy_(options["prefix_index"].flip(0))
        for x in outputs:
            x.detach().fill_(float("nan"))
        graph.replay()
        same_bits(outputs, run())


def test_two_graphs_share_nothing(cuda, problem):
    """Captured one after the other with one prefix_index; the second is replayed alone."""
    short, long = (problem(B=5, Lq=1, Lk=Lk, P=300) for Lk in (200, 333))
    options = packed(short)
    first_run, _ = call_of(short, options)
    second_run, second_tensors = call_of(long, options)
    first, _ = captured(first_run)
    second, outputs = captured(second_run)
    change(second_tensors)
    options["prefix_index"].copy_(options["prefix_index"].roll(1))
    second.replay()
    same_bits(outputs, second_run())
    first.reset()  # its memory is free for others
    scratch = [torch.full((1 << 20,), float("nan"), device=cuda) for _ in range(8)]
    options["prefix_index"].copy_(options["prefix_index"].roll(1))
    second.replay()
    same_bits(outputs, second_run())
    del scratch


def test_the_compiler_s_graphs(cuda, problem):
    """mode="reduce-overhead" makes graphs of its own, and refuses tensors that outlive a call."""
    p = problem(**SHAPES["decode"])
    options = packed(p)
    _, tensors = call_of(p, options)

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def layers(query, index):
        for _ in range(2):
            query = prefix_attention(
                query, *tensors[1:5], is_causal=True,
                prefix_lengths=options["prefix_lengths"], prefix_index=index,
            )  # fmt: skip
        return query

    for _ in range(4):  # eager, recorded, replayed
        torch.compiler.cudagraph_mark_step_begin()
        change(tensors)
        index = options["prefix_index"].roll(1)
        found = layers(tensors[0], index).clone()
        expected = tensors[0]
        for _ in range(2):
            expected = prefix_attention(
                expected, *tensors[1:5], is_causal=True,
                prefix_lengths=options["prefix_lengths"], prefix_index=index,
            )  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
