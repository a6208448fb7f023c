"""The dtype that a machine multiplies fast."""

import warnings

import pytest
import torch

from fastprefix.training import run, speed


@pytest.mark.parametrize(
    ("half_ms", "dtype"),
    [(0.4, torch.bfloat16), (1.4, torch.bfloat16), (1.6, torch.float32), (30.0, torch.float32)],
)
def test_bfloat16_is_left_where_it_is_slow(monkeypatch, half_ms, dtype):
    times = {torch.bfloat16: half_ms, torch.float32: 1.0}
    monkeypatch.setattr(speed, "product_ms", lambda dtype, device: times[dtype])
    assert speed.fast_dtype(torch.device("cpu")) is dtype


def test_a_gpu_is_not_asked(monkeypatch):
    monkeypatch.setattr(speed, "product_ms", None)
    assert speed.fast_dtype(torch.device("cuda")) is torch.bfloat16


def test_products_take_time():
    assert speed.product_ms(torch.float32, torch.device("cpu")) > 0


def test_a_run_in_a_slow_dtype_says_so(monkeypatch):
    monkeypatch.setattr(speed, "product_ms", lambda dtype, device: 9.0 / dtype.itemsize**2)
    with pytest.warns(UserWarning, match="dtype: got float16, which this CPU multiplies several"):
        run._warn_of_slow("float16", torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run._warn_of_slow("float32", torch.device("cpu"))
        run._warn_of_slow("float16", torch.device("cuda"))
