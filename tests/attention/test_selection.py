"""Which backend runs: what `auto` takes, and what a backend says when it cannot."""

from __future__ import annotations

import re

import pytest
import torch

from fastprefix import prefix_attention
from fastprefix.attention import selection


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


@pytest.mark.parametrize(
    ("feature", "call", "options"),
    [
        ("float64", {"dtype": torch.float64}, {}),
        ("attn_mask", {}, {"attn_mask": torch.ones(3, 3, dtype=torch.bool)}),
        ("D != Dv", {"Dv": 4}, {}),
    ],
)
def test_triton_names_the_feature_and_those_that_can(feature, call, options):
    with pytest.raises(RuntimeError) as caught:
        prefix_attention(*tensors(**call), **options, backend="triton")
    message = str(caught.value)
    assert "triton" in message
    assert feature in message.split("Backends that can")[0]
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


def test_reference_is_never_the_default():
    assert "reference" not in selection.AUTO.values()


def test_the_documented_table_is_the_table():
    """The docstring of the module is what users read."""
    rows = re.findall(r"^\| (\w+) +\|(.*)\|$", selection.__doc__, re.M)
    documented = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    documented.pop("backend")
    assert documented.keys() == selection.BACKENDS.keys()
    short = {"fp64": torch.float64, "fp32": torch.float32}
    short |= {"bf16": torch.bfloat16, "fp16": torch.float16}
    for name, backend in selection.BACKENDS.items():
        devices, dtypes, attn_mask, own_head_size = documented[name]
        assert {short[word] for word in dtypes.split()} == backend.dtypes
        assert (attn_mask == "yes") == ("attn_mask" in backend.features)
        assert (own_head_size == "yes") == ("D != Dv" in backend.features)
        assert (devices == "any") == (backend.devices is None)
        for device in backend.devices or ():
            assert device in devices.lower()
