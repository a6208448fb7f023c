"""Which backend runs: what `auto` takes, and what a backend says when it cannot."""

from __future__ import annotations

import pytest
import torch

from fastprefix import prefix_attention
from fastprefix.attention import selection
from fastprefix_testing import calls as feature_calls


def tensors(dtype=torch.float32, Dv=8, device="cpu"):
    query = torch.randn(1, 2, 3, 8, dtype=dtype, device=device)
    value = torch.randn(1, 2, 3, Dv, dtype=dtype, device=device)
    return query, query, value, query[0], value[0]


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    """These tests are about messages, so they hold with and without the interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"backend.*'flash'.*auto.*reference.*composed.*triton"):
        prefix_attention(*tensors(), backend="flash")


def test_triton_names_a_dtype_and_those_that_can():
    with pytest.raises(RuntimeError) as caught:
        prefix_attention(*tensors(torch.float64), backend="triton")
    message = str(caught.value)
    assert "triton" in message
    assert "float64" in message.split("Backends that can")[0]
    able = message.split("Backends that can")[1]
    assert "'reference'" in able
    assert "'composed'" in able
    assert "triton" not in able


def test_triton_names_a_head_size_that_is_too_large():
    x = torch.randn(1, 1, 2, 300)
    with pytest.raises(RuntimeError, match=r"256.*300.*Backends that can.*composed"):
        prefix_attention(x, x, x, backend="triton")


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"triton.*TRITON_INTERPRET=1.*Backends that can"):
        prefix_attention(*tensors(), backend="triton")


def test_composed_names_its_device():
    with pytest.raises(RuntimeError, match=r"composed.*cpu.*meta.*Backends that can: 'reference'"):
        prefix_attention(*tensors(device="meta"), backend="composed")


def test_auto_on_a_device_without_a_fused_backend_says_what_to_pass():
    with pytest.raises(RuntimeError, match=r"auto.*meta.*backend='reference'"):
        prefix_attention(*tensors(device="meta"))


def test_a_floating_dtype_that_no_backend_takes():
    with pytest.raises((RuntimeError, TypeError), match="float8"):
        prefix_attention(*(x.to(torch.float8_e5m2) for x in tensors()))


def test_auto_on_the_cpu_is_composed():
    inputs = tensors()
    assert torch.equal(prefix_attention(*inputs), prefix_attention(*inputs, backend="composed"))


def test_reference_is_the_first_choice_nowhere():
    assert all(names[0] != "reference" for names in selection.AUTO.values())


def test_auto_on_the_cpu_is_reference_where_composed_cannot():
    name, reason = selection.choose_backend(
        "auto", "cpu", torch.float32, frozenset({"attn_mask gradient", "attn_mask"}), 8
    )
    assert name == "reference"
    assert "attn_mask gradient" in reason
    inputs = tensors()
    learned = {"attn_mask": torch.randn(3, 3, requires_grad=True)}
    found = prefix_attention(*inputs, **learned)
    assert torch.equal(found, prefix_attention(*inputs, **learned, backend="reference"))


@pytest.mark.parametrize("options", [{"softcap": 1.0}, {"dropout_p": 0.5}])
def test_auto_on_the_cpu_is_composed_for_a_softcap_and_for_dropout(options):
    inputs, found = tensors(), []
    for backend in ("auto", "composed", "reference"):
        torch.manual_seed(0)
        found.append(prefix_attention(*inputs, **options, backend=backend))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])  # in their last bits, or by their masks


@pytest.mark.parametrize("feature", ["softcap", "dropout_p"])
def test_composed_on_cuda_has_no_scores(feature):
    why_not = selection.refusal("composed", "cuda", torch.bfloat16, frozenset({feature}), 64)
    assert why_not == f"it cannot do {feature}"
    assert not selection.has_feature("composed", "cuda", feature)
    assert not selection.has_feature("auto", "cuda", feature)
    assert selection.has_feature("auto", "cpu", feature)


def test_composed_asked_for_by_name_never_falls_back():
    with pytest.raises(RuntimeError, match=r"composed.*batch_invariant.*'triton'"):
        prefix_attention(*tensors(), batch_invariant=True, backend="composed")


@pytest.mark.parametrize("name", selection.BACKENDS)
@pytest.mark.parametrize("feature", selection.FEATURES)
def test_a_backend_runs_what_the_table_says_and_refuses_the_rest(name, feature):
    call = feature_calls.build(features={feature}, dtype=torch.float32, Dv=8)
    if feature in selection.BACKENDS[name].features:
        assert call.by(name)["out"].shape == call.grad_out.shape
    else:
        with pytest.raises(RuntimeError) as caught:
            call.by(name)
        refused, able = str(caught.value).split("Backends that can")
        assert feature in refused
        assert ("'triton'" if feature == "batch_invariant" else "'reference'") in able


@pytest.mark.parametrize("feature", sorted(selection.LARGE_GRADIENTS))
def test_reference_runs_what_wants_a_large_gradient_on_every_device(feature):
    for device in selection.AUTO:
        name, reason = selection.choose_backend(
            "auto", device, torch.float32, frozenset({feature}), 8
        )
        assert name == "reference"
        assert feature in reason


def test_nobody_wants_a_gradient_where_none_are_computed():
    mask = torch.zeros(3, 3, requires_grad=True)
    with torch.no_grad():
        got = prefix_attention(*tensors(), attn_mask=mask, backend="composed")
    assert not got.requires_grad


def test_the_documented_table_is_the_table():
    """The docstring of the module is what users read."""
    lines = [line for line in selection.__doc__.splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    documented = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    assert set(head[1:]) == set(selection.columns())
    assert list(documented) == ["devices", "dtypes", "largest head size", *selection.FEATURES]
    short = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    all_four = {*short.values(), torch.float64}
    for name, backend in selection.columns().items():
        devices = documented["devices"][name]
        assert (devices == "any") == (backend.devices is None)
        assert all(device in devices.lower() for device in backend.devices or ())
        dtypes = documented["dtypes"][name]
        named = all_four if dtypes == "all four" else {short[word] for word in dtypes.split()}
        assert named == backend.dtypes
        limit = documented["largest head size"][name]
        assert limit == ("any" if backend.max_head_size is None else str(backend.max_head_size))
        for feature in selection.FEATURES:
            assert documented[feature][name] == ("yes" if feature in backend.features else "no")


def test_auto_on_cuda_is_triton_and_then_composed(monkeypatch):
    def chosen(head_size=64, features=frozenset(), dtype=torch.bfloat16):
        return selection.choose_backend("auto", "cuda", dtype, features, head_size)

    monkeypatch.setattr(torch.version, "hip", None)
    assert chosen() == ("triton", "the default on cuda")
    name, reason = chosen(head_size=300)
    assert name == "composed"
    assert "256" in reason
    monkeypatch.setattr(selection, "_TRITON_INSTALLED", False)
    name, reason = chosen()
    assert name == "composed"
    assert "Triton is not installed" in reason
    for cannot in ({"features": frozenset({"softcap"})}, {"dtype": torch.float64}):
        with pytest.raises(RuntimeError, match=r"composed cannot.*Backends that can: 'reference'"):
            chosen(**cannot)


def test_composed_takes_float64_on_the_cpu_alone():
    arguments = (torch.float64, frozenset(), 8)
    assert selection.refusal("composed", "cpu", *arguments) is None
    assert "not float64" in selection.refusal("composed", "cuda", *arguments)


def test_composed_is_not_for_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    why_not = selection.refusal("composed", "cuda", torch.bfloat16, frozenset(), 64)
    assert "ROCm" in why_not
    assert selection.refusal("triton", "cuda", torch.bfloat16, frozenset(), 64) is None
