"""torch.compile traces the operator whole, forward and backward, and changes no result."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config

from fastprefix import prefix_attention
from fastprefix.attention.selection import BACKENDS
from fastprefix_testing import calls as feature_calls
from fastprefix_testing.problems import Problem


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block(backend):
    """A function with work before and after the operator, as in a model."""

    def run(query, key, value, prefix_key, prefix_value, **options):
        out, lse = prefix_attention(
            query * 1.5, key + 0.1, value.tanh(), prefix_key, prefix_value,
            **options, return_lse=True, backend=backend,
        )  # fmt: skip
        return out.transpose(1, 2).reshape(out.shape[0], -1, out.shape[1] * out.shape[3]), lse

    return run


def solve(problem, function):
    """`problem.solve`, with the gradient in the shape that `block` returns."""
    grad_out = problem.grad_out
    B, Hq, Lq, D = grad_out.shape
    flat = grad_out.transpose(1, 2).reshape(B, Lq, Hq * D)
    return problem.changed(grad_out=flat).solve(function)


CALLS = {
    "causal, padded": {"is_causal": True, "padding": "left", "Lk": 9},
    "bidirectional": {},
    "no prefix": {"P": None, "is_causal": True},
    "one query": {"Lq": 1, "Lk": 9, "is_causal": True},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_one_graph_with_equal_results(backend, call):
    if backend == "reference" and call != CALLS["causal, padded"]:
        pytest.skip("plain PyTorch throughout: once is enough")
    problem = Problem(**call, Hq=2, Hkv=1).draw()
    function = block(backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(solve(problem, compiled), solve(problem, function))


def test_dynamic_shapes_compile_once():
    """The lengths of a decoding loop and of ragged batches must not compile anew each step."""
    function = block("composed")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    # Sizes that are equal by chance would be compiled in as equal.
    for B, Lq, Lk, P in ((5, 3, 7, 11), (6, 8, 9, 12), (7, 5, 13, 15)):
        problem = Problem(B=B, Lq=Lq, Lk=Lk, P=P, is_causal=True, padding="left").draw()
        torch.testing.assert_close(solve(problem, compiled), solve(problem, function))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


def test_masks_and_value_head_sizes(masking_backend):
    problem = Problem(Dv=24, is_causal=True).draw().changed(attn_mask=torch.rand(2, 1, 7, 7) < 0.7)
    function = block(masking_backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(solve(problem, compiled), solve(problem, function))


@pytest.mark.parametrize(
    ("backend", "without"),
    [("reference", "dropout_p"), ("composed", "dropout_p"), ("composed", "softcap")],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_feature_in_one_graph(backend, without, packed):
    features = set(BACKENDS[backend].features) - {"prefix_bias [Hq, Lq, P]", "dropout_p", without}
    alone = {"attn_mask", "attn_mask gradient", "key_lengths"}  # not with packed sequences
    features -= alone if packed else {"cu_seqlens"}
    call = feature_calls.build(
        features=features, dtype=torch.float32, pad="left", past=2, lengths=(3, 0, 5)
    )

    def run(**arguments):
        return prefix_attention(**arguments, return_lse=True, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call.solve(compiled), call.by(backend))


def test_dropout_under_the_compiler():
    """Drawn in the graph: the same from the same seed, another one in the next call."""
    tensors = [x.requires_grad_() for x in Problem().draw().tensors.values()]

    def run(*tensors):
        return prefix_attention(*tensors, dropout_p=0.5)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = []
    for function in (run, compiled, compiled):
        torch.manual_seed(3)
        out = function(*tensors)
        found.append([out, *torch.autograd.grad(out.sum(), tensors)])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    assert not torch.allclose(compiled(*tensors), found[0][0])


@pytest.mark.parametrize("Lq", [1, 7])
def test_inductor(Lq):
    """Inductor checks the strides that the fake ops promised against those it gets."""
    problem = Problem(is_causal=True, padding="left", Lq=Lq, Lk=9).draw()

    # Only the operator: with other work a C++ compiler would run, for a minute.
    def run(**arguments):
        return prefix_attention(**arguments, return_lse=True)

    compiled = torch.compile(run, fullgraph=True)
    # The cache on disk is blind to the code of fake ops.
    with torch._inductor.config.patch(force_disable_caches=True):
        got = problem.solve(compiled)
    torch.testing.assert_close(got, problem.solve(run))


def test_errors_are_the_same_under_the_compiler():
    problem = Problem(Lq=7, Lk=3).draw()
    compiled = torch.compile(block("auto"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="Lk >= Lq"):
        compiled(*problem.tensors.values(), is_causal=True)


def test_one_graph_for_many_scales():
    """The scale of a second model, or softcap, makes a symbol of the first one's number."""
    torch._dynamo.reset()
    x = torch.randn(1, 2, 3, 8)
    prefix = torch.randn(2, 4, 8)

    def attend(scale, softcap):
        return prefix_attention(
            x, x, x, prefix, prefix, is_causal=True, scale=scale, softcap=softcap,
            backend="reference",
        )  # fmt: skip

    compiled = torch.compile(attend, fullgraph=True, backend="eager", dynamic=True)
    for scale, softcap in ((0.5, 20.0), (0.25, 30.0), (0.125, 40.0)):
        torch.testing.assert_close(compiled(scale, softcap), attend(scale, softcap))
