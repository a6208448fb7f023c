"""torch.func and forward mode: right, or refused by name; a tangent is never lost."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import (
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)

from fastprefix import prefix_attention
from fastprefix_testing.problems import Problem

SMALL = {"B": 1, "Hq": 2, "Hkv": 1, "Lq": 3, "P": 4, "D": 8, "is_causal": True}
NAMES = ("query", "key", "value", "prefix_key", "prefix_value")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def attend():
    """The operator as a function of one of its tensors, by name and backend; and the tensor."""
    problem = Problem(**SMALL).draw()
    sinks, bias = torch.randn(2), torch.randn(2)
    tensors = {**problem.tensors, "sinks": sinks, "prefix_bias": bias}

    def function_of(name, backend, dtype=torch.float32):
        given = {n: x.to(dtype) for n, x in tensors.items()}

        def run(x):
            return prefix_attention(**{**given, name: x}, is_causal=True, backend=backend)

        return run, given[name]

    return function_of


def dual(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


def dual_without_gradients(function, x, tangent):
    with torch.no_grad():
        return dual(function, x, tangent)


def of_compiled(transform):
    def run(function, x, tangent):
        return transform(torch.compile(function, backend="eager"), x, tangent)

    return run


def compiled(transform):
    def run(function, x, tangent):
        inside = torch.compile(lambda x, t: transform(function, x, t), backend="eager")
        return inside(x, tangent)

    return run


def tangent_of(function, x, tangent):
    return jvp(function, (x,), (tangent,))[1]


FORWARD = {
    "jvp": tangent_of,
    "jacfwd": lambda f, x, t: torch.tensordot(jacfwd(f)(x), t, t.dim()),
    "linearize": lambda f, x, t: linearize(f, x)[1](t),
    "forward_ad": dual,
    "forward_ad without gradients": dual_without_gradients,
    "jvp without gradients": torch.no_grad()(tangent_of),
    "vmap of jvp": lambda f, x, t: vmap(lambda t: tangent_of(f, x, t))(t[None])[0],
    "jvp of vmap": lambda f, x, t: tangent_of(lambda x: vmap(f)(x[None])[0], x, t),
}
COMPILED = {
    "jvp of what is compiled": of_compiled(tangent_of),
    "forward_ad of what is compiled": of_compiled(dual),
    "compiled jvp": compiled(tangent_of),
    "compiled forward_ad": compiled(dual),
}


@pytest.mark.parametrize("transform", FORWARD.values(), ids=FORWARD)
def test_fused_backends_refuse_forward_mode(fused_backend, transform, attend):
    """PyTorch takes an op without a formula for a constant: its tangent was exactly zero."""
    function, x = attend("query", fused_backend)
    match = f"backend: got '{fused_backend}' for forward-mode.*takes 'reference'"
    with pytest.raises(NotImplementedError, match=match):
        transform(function, x, torch.randn_like(x))


@pytest.mark.parametrize("transform", COMPILED.values(), ids=COMPILED)
def test_so_they_do_under_the_compiler(transform, attend):
    function, x = attend("query", "composed")
    with pytest.raises(NotImplementedError, match=r"for forward-mode.*takes 'reference'"):
        transform(function, x, torch.randn_like(x))


@pytest.mark.parametrize("name", [*NAMES, "sinks", "prefix_bias"])
@pytest.mark.parametrize("transform", ["jvp", "forward_ad"])
def test_no_tangent_is_lost_whatever_it_is_of(transform, name, attend):
    function, x = attend(name, "auto")
    with pytest.raises(NotImplementedError, match="takes 'reference'"):
        FORWARD[transform](function, x, torch.randn_like(x))


def test_nor_is_that_of_an_added_mask():
    tensors = Problem(**SMALL).draw().tensors
    mask = torch.randn(1, 1, 3, 3)
    with pytest.raises(NotImplementedError, match="takes 'reference'"):
        tangent_of(lambda mask: prefix_attention(**tensors, attn_mask=mask), mask, mask)


def test_nor_that_of_a_gradient(attend):
    function, x = attend("query", "composed")
    x.requires_grad_()
    out = function(x)
    with forward_ad.dual_level():
        weights = forward_ad.make_dual(torch.randn_like(out), torch.randn_like(out))
        with pytest.raises(NotImplementedError, match="takes 'reference'"):
            torch.autograd.grad(out, x, weights)


@pytest.mark.parametrize("name", [*NAMES, "sinks", "prefix_bias"])
def test_reference_has_forward_mode(name, attend):
    function, x = attend(name, "reference", torch.float64)
    tangent, step = torch.randn_like(x), 1e-6
    expected = (function(x + step * tangent) - function(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(tangent_of(function, x, tangent), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(dual(function, x, tangent), expected, rtol=1e-6, atol=1e-8)


def test_what_has_no_tangent_is_not_refused(fused_backend, attend):
    """The attention is a constant of the function that is differentiated, as SDPA may be."""
    function, x = attend("query", fused_backend)
    scale, step = torch.tensor(2.0), torch.tensor(1.0)
    out, tangent = jvp(lambda scale: scale * function(x), (scale,), (step,))
    torch.testing.assert_close(tangent, function(x))
    torch.testing.assert_close(out, 2 * function(x))


def summed(function):
    return lambda x: (function(x) ** 2).sum()


REVERSE = {
    "grad": lambda f, x: grad(summed(f))(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jacrev": lambda f, x: jacrev(lambda x: f(x).sum(-1))(x),
    "vmap of grad": lambda f, x: vmap(grad(summed(f)))(torch.stack([x, 2 * x])),
    "grad of vmap": lambda f, x: grad(lambda x: vmap(summed(f))(torch.stack([x, 2 * x])).sum())(x),
    "beside jvp": lambda f, x: grad(lambda x: jvp(torch.sin, (f(x),), (f(x),))[1].sum())(x),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", REVERSE.values(), ids=REVERSE)
def test_gradients_of_torch_func(fused_backend, transform, attend):
    for name in ("query", "prefix_key") if fused_backend == "composed" else ("query",):
        function, x = attend(name, fused_backend)
        reference, _ = attend(name, "reference")
        torch.testing.assert_close(transform(function, x), transform(reference, x))


@pytest.mark.parametrize("place", ["in", "of"])
def test_gradients_of_torch_func_and_a_compiled_function(place, attend):
    """The call itself is not compiled: Dynamo cannot follow it there."""
    function, x = attend("query", "composed")
    if place == "in":
        got = torch.compile(lambda x: grad(summed(function))(x), backend="eager")(x)
    else:
        got = grad(summed(torch.compile(function, backend="eager")))(x)
    torch.testing.assert_close(got, grad(summed(function))(x))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: functionalize(f),
        lambda f: lambda x: vmap(f)(x[None])[0],
        lambda f: torch.compile(lambda x: vmap(f)(x[None])[0], backend="eager", fullgraph=True),
    ],
    ids=["functionalize", "vmap", "compiled vmap"],
)
def test_transforms_that_differentiate_nothing(fused_backend, transform, attend):
    function, x = attend("query", fused_backend)
    torch.testing.assert_close(transform(function)(x), function(x))


def test_one_graph_with_gradients_of_torch_func_is_refused_by_name(attend):
    function, x = attend("query", "composed")
    whole = torch.compile(grad(summed(function)), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"NotImplementedError.*got 'composed'.*takes 'reference'"):
        whole(x)


def twice(function, x):
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(summed(function)(x), x, create_graph=True)
    return torch.autograd.grad(first.sum(), x)[0]


SECOND = {
    "hessian": lambda f, x: hessian(summed(f))(x),
    "jacrev of grad": lambda f, x: jacrev(grad(summed(f)))(x),
    "grad of grad": lambda f, x: grad(lambda x: grad(summed(f))(x).sum())(x),
    "create_graph": twice,
}


@pytest.mark.parametrize("transform", SECOND.values(), ids=SECOND)
def test_second_derivatives_are_the_reference_backends_alone(fused_backend, transform, attend):
    function, x = attend("query", fused_backend)
    with pytest.raises(NotImplementedError, match="takes 'reference'"):
        transform(function, x)


def test_and_it_has_them(attend):
    function, x = attend("query", "reference", torch.float64)
    whole = SECOND["hessian"](function, x)
    torch.testing.assert_close(SECOND["jacrev of grad"](function, x), whole)
    summed_up = whole.flatten(x.dim()).unflatten(-1, x.shape).sum(tuple(range(x.dim())))
    torch.testing.assert_close(SECOND["grad of grad"](function, x), summed_up)
    torch.testing.assert_close(twice(function, x), summed_up)
    assert summed_up.abs().max() > 1e-3
