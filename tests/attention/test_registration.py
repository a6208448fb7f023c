"""The operator as PyTorch's machinery sees it: torch.library's own checks, and autograd."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastprefix import prefix_attention
from fastprefix.options import OPTIONS, SCHEMA, Options
from fastprefix_testing import calls as feature_calls
from fastprefix_testing.problems import Problem

# opcheck runs an op dozens of times, and the interpreter is slow: small problems.
SMALL = {"Hq": 2, "Hkv": 1, "Lq": 3, "P": 4}
FIVE = ("query", "key", "value", "prefix_key", "prefix_value")
CALLS = {
    "plain": SMALL,
    "causal": {**SMALL, "is_causal": True, "Lk": 5, "B": 1},
    "padded": {**SMALL, "padding": "row", "P": 0, "is_causal": True},
    "decode": {**SMALL, "Lq": 1, "Lk": 4, "is_causal": True, "padding": "left"},
    "empty batch": {**SMALL, "B": 0},
    "no keys": {**SMALL, "Lk": 0, "dtype": torch.bfloat16},
}


def op_arguments(problem, backend):
    """Positional arguments of the registered op."""
    options = {"scale": 0.25, **{k: v for k, v in problem.options.items() if v is not None}}
    return (*problem.tensors.values(), *Options(**options), backend)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_opcheck_of_the_forward(fused_backend, call):
    problem = Problem(**call).draw()
    for x in problem.tensors.values():
        x.requires_grad_()
    torch.library.opcheck(
        torch.ops.fastprefix.prefix_attention.default, op_arguments(problem, fused_backend)
    )


@pytest.mark.parametrize("memory", ["sliced", "blhd", "last dimension strided"])
def test_opcheck_of_the_forward_with_strides(memory):
    problem = Problem().draw()
    for name, x in problem.tensors.items():
        if memory == "sliced":
            x = torch.cat([x, x], -1)[..., : x.shape[-1]]
        elif memory == "blhd":
            x = x.transpose(-3, -2).contiguous().transpose(-3, -2)
        else:
            x = torch.stack([x, x], -1)[..., 0]
        problem.tensors[name] = x.requires_grad_()
    torch.library.opcheck(
        torch.ops.fastprefix.prefix_attention.default, op_arguments(problem, "composed")
    )


@pytest.mark.parametrize(("is_causal", "Dv", "kind"), [(False, 24, "bool"), (True, 16, "additive")])
def test_opcheck_with_attn_mask(is_causal, Dv, kind):
    mask = torch.randn(2, 1, 7, 7)
    problem = Problem(Dv=Dv).draw().changed(attn_mask=mask > 0 if kind == "bool" else mask)
    problem.options["is_causal"] = is_causal
    for x in problem.tensors.values():
        x.requires_grad_()
    torch.library.opcheck(
        torch.ops.fastprefix.prefix_attention.default, op_arguments(problem, "composed")
    )


def check_backward(problem, backend, needs):
    """Runs opcheck on the backward op at what the forward returns."""
    inputs = op_arguments(problem, backend)
    out, lse = torch.ops.fastprefix.prefix_attention(*inputs)
    torch.library.opcheck(
        torch.ops.fastprefix.prefix_attention_backward.default,
        (problem.grad_out, *inputs[:5], out, lse, *inputs[5:], needs),
    )


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_opcheck_of_the_backward(fused_backend, call):
    check_backward(Problem(**call).draw(), fused_backend, [True] * 5 + [False] * 2)


FEATURES = {
    "prefixes, window, sinks, bias": {
        "features": {"packed prefixes", "prefix_in_window", "sinks", "prefix_bias [Hq]"},
        "lengths": (3, 4),
        "pad": "left",
    },
    "sequences, bias by column": {
        "features": {"cu_seqlens", "sliding_window", "prefix_bias [Hq, Lq, P]", "D != Dv"},
        "dtype": torch.bfloat16,
        "wide_parameters": True,
    },
    "cap, dropout": {"features": {"softcap", "dropout_p", "sinks", "packed prefixes"}},
}


@pytest.mark.parametrize("call", FEATURES.values(), ids=FEATURES)
def test_opcheck_with_features(call):
    call = feature_calls.build(**{"dtype": torch.float32, **call}, D=8)
    tensors, options = dict(call.tensors), dict(call.options)
    if "dropout_p" in options:
        options["dropout_seed"] = torch.tensor([3])
    five = [tensors.pop(name).requires_grad_() for name in FIVE]
    added = {name: x.requires_grad_() for name, x in tensors.items()}
    inputs = (*five, *Options(scale=0.25, **options, **added), "composed")
    torch.library.opcheck(torch.ops.fastprefix.prefix_attention.default, inputs)
    out, lse = torch.ops.fastprefix.prefix_attention(*inputs)
    needs = [True] * 5 + ["sinks" in added, "prefix_bias" in added]
    torch.library.opcheck(
        torch.ops.fastprefix.prefix_attention_backward.default,
        (call.grad_out, *(x.detach() if isinstance(x, torch.Tensor) else x for x in
         (*inputs[:5], out, lse, *inputs[5:])), needs),
    )  # fmt: skip


def test_the_schema_has_the_fields_of_the_options():
    names = [argument.split()[-1] for argument in SCHEMA.split(", ")]
    assert names == list(Options._fields)


def test_the_op_is_left_out_where_nobody_looks_on(monkeypatch):
    """Its dispatch costs more than a small call; what it returns is the same."""
    from fastprefix.attention import op

    calls = []
    for name in ("prefix_attention_op", "prefix_attention_backward_op"):
        real = getattr(op, name)
        monkeypatch.setattr(op, name, lambda *a, real=real: calls.append(1) or real(*a))
    problem = Problem(**SMALL, is_causal=True).draw()
    tensors = list(problem.tensors.values())
    plain = prefix_attention(*tensors)
    tensors[3].requires_grad_()
    with torch.no_grad():
        assert torch.equal(prefix_attention(*tensors), plain)
    out = prefix_attention(*tensors)
    assert torch.equal(out, plain)
    (left_out,) = torch.autograd.grad(out, tensors[3], problem.grad_out)
    sinks = torch.full((2,), -float("inf"), requires_grad=True)
    torch.testing.assert_close(prefix_attention(*tensors, sinks=sinks), plain)
    assert not calls
    with FlopCounterMode(display=False):  # a mode sees one op forward and one backward
        (watched,) = torch.autograd.grad(prefix_attention(*tensors), tensors[3], problem.grad_out)
    assert len(calls) == 2
    assert torch.equal(watched, left_out)


def test_the_output_may_be_changed_in_place_where_no_backward_follows(fused_backend):
    """Autograd refuses that at once for a view that a function returns; this is none."""
    problem = Problem(**SMALL).draw()
    leaves = [x.requires_grad_() for x in problem.tensors.values()]
    out = prefix_attention(*leaves, backend=fused_backend)
    out.mul_(2)
    torch.testing.assert_close(out, 2 * problem.by(fused_backend)["out"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, leaves, problem.grad_out)


def test_saved_tensors_go_through_hooks(fused_backend):
    """As offloading does: what the backward reads is what the hook hands back."""
    problem = Problem(**SMALL, padding="left").draw()
    leaves = [x.requires_grad_() for x in problem.tensors.values()]
    packed = []

    def pack(x):
        packed.append(x)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = prefix_attention(*leaves, **problem.options, backend=fused_backend)
    grads = torch.autograd.grad(out, leaves, problem.grad_out)
    assert any(x is problem.options["key_padding_mask"] for x in packed)
    expected = problem.by(fused_backend)
    for name, got in zip(problem.tensors, grads, strict=True):
        torch.testing.assert_close(got, expected[name])


@pytest.mark.parametrize("name", FIVE)
def test_a_batch_of_gradients(name, fused_backend):
    """A vmap over the backward, as torch.autograd.functional.jacobian runs it."""
    problem = Problem(**SMALL).draw()
    x = problem.tensors[name].requires_grad_()
    out = prefix_attention(*problem.tensors.values(), backend=fused_backend)
    several = torch.stack([problem.grad_out, 2 * problem.grad_out])
    (got,) = torch.autograd.grad(out, x, several, is_grads_batched=True, retain_graph=True)
    (once,) = torch.autograd.grad(out, x, problem.grad_out)
    torch.testing.assert_close(got, torch.stack([once, 2 * once]))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_is_drawn_again_by_checkpointing(use_reentrant):
    problem = Problem(**SMALL).draw()

    def run(*tensors):
        return prefix_attention(*tensors, dropout_p=0.5)

    found = []
    for function in (run, lambda *t: checkpoint(run, *t, use_reentrant=use_reentrant)):
        leaves = [x.detach().requires_grad_() for x in problem.tensors.values()]
        torch.manual_seed(5)
        out = function(*leaves)
        out.backward(problem.grad_out)
        found.append([out.detach(), *(x.grad for x in leaves)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("wanted", range(5))
def test_opcheck_of_a_single_gradient(wanted):
    needs = [i == wanted for i in range(7)]
    check_backward(Problem(**SMALL, padding="left", is_causal=True).draw(), "composed", needs)


def test_fake_tensors_agree_in_strides_for_one_query(fused_backend):
    """A compiler plans with the fake op's strides, and reads the real op's memory with them."""
    problem = Problem(Lq=1, Lk=4).draw()
    inputs = op_arguments(problem, fused_backend)
    real = torch.ops.fastprefix.prefix_attention(*inputs)
    mode = torch._subclasses.FakeTensorMode()
    fake_inputs = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    with mode:
        fake = torch.ops.fastprefix.prefix_attention(*fake_inputs)
    for x, y in zip(real, fake, strict=True):
        assert all(x.stride(d) == y.stride(d) for d in range(x.dim()) if x.shape[d] > 1)
        assert x.dtype == y.dtype


def test_no_gradient_flows_through_the_log_sum_exp(backend):
    tensors = [x.requires_grad_() for x in Problem().draw().tensors.values()]
    out, lse = prefix_attention(*tensors, return_lse=True, backend=backend)
    assert out.requires_grad
    assert not lse.requires_grad


def test_log_sum_exp_in_a_loss_changes_no_gradient(backend):
    problem = Problem(**SMALL).draw()

    def run(**arguments):
        out, lse = prefix_attention(**arguments, return_lse=True, backend=backend)
        return out + 0 * lse[..., None], lse

    torch.testing.assert_close(problem.solve(run), problem.by(backend))


def test_no_graph_without_gradients(backend):
    problem = Problem(**SMALL).draw()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = prefix_attention(*problem.tensors.values(), backend=backend)
        assert not got.requires_grad
        torch.testing.assert_close(got, problem.by(backend)["out"])


def test_second_derivatives_are_refused_and_not_wrong(fused_backend):
    problem = Problem().draw()
    leaves = [x.requires_grad_() for x in problem.tensors.values()]
    out = prefix_attention(*leaves, backend=fused_backend)
    grads = torch.autograd.grad((out**2).sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="takes 'reference'"):
        torch.autograd.grad(sum(g.sum() for g in grads), leaves)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(backend, use_reentrant):
    problem = Problem(**SMALL, is_causal=True, padding="left").draw()

    def checkpointed(*tensors, **options):
        def run(*tensors):
            return prefix_attention(*tensors, **options, return_lse=True, backend=backend)

        return checkpoint(run, *tensors, use_reentrant=use_reentrant)

    leaves = [x.requires_grad_() for x in problem.tensors.values()]
    out, _ = checkpointed(*leaves, **problem.options)
    out.backward(problem.grad_out)  # reentrant checkpoints refuse torch.autograd.grad
    expected = problem.by(backend)
    for name, x in problem.tensors.items():
        torch.testing.assert_close(x.grad, expected[name], msg=name)


def test_several_forwards_before_one_backward(backend):
    """One prefix in two calls (two micro-batches, a prompt's completions): gradients add up."""
    first, second = Problem(**SMALL).draw(), Problem(**SMALL, is_causal=True).draw(seed=1)
    shared = {n: first.tensors[n] for n in ("prefix_key", "prefix_value")}
    second.tensors.update(shared)
    expected = [p.by(backend) for p in (first, second)]
    for x in shared.values():
        x.requires_grad_()
    outs = [
        prefix_attention(*p.tensors.values(), **p.options, backend=backend) for p in (first, second)
    ]
    torch.autograd.backward(outs, [first.grad_out, second.grad_out])
    for name, x in shared.items():
        torch.testing.assert_close(x.grad, expected[0][name] + expected[1][name])


def test_the_public_function_takes_the_options_of_the_table():
    own = {"query", "key", "value", "prefix_key", "prefix_value", "return_lse", "backend"}
    taken = set(inspect.signature(prefix_attention).parameters) - {"unknown"}
    assert taken == own | {name for name, option in OPTIONS.items() if option.argument}
