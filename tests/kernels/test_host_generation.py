"""What a generation compiles and plans while its text grows, on a simulated GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import simulated_gpu
from fastprefix.kernels import decode
from fastprefix.kernels.decode_kernels import (
    prefix_attn_decode_kernel,
    prefix_attn_decode_merge_kernel,
)
from fastprefix.kernels.forward import prefix_attn_fwd_kernel
from fastprefix.kernels.plan_cache import PLANS
from fastprefix.kernels.table_kernels import prefix_attn_tables_kernel
from fastprefix_testing.launcher_calls import SEVERAL, Call, attend, causal_call
from fastprefix_testing.simulated import inside, outside, run_inside

KERNELS = (
    prefix_attn_fwd_kernel,
    prefix_attn_decode_kernel,
    prefix_attn_decode_merge_kernel,
    prefix_attn_tables_kernel,
)
SOME_LENGTHS = sorted({*range(1, 301, 9), *range(16, 301, 16)})
GIVEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"pad": True},
    "window": {"sliding_window": 100},
    "several prefixes": SEVERAL,
}


@outside
def test_on_a_simulated_gpu():
    run_inside(__file__)


@inside
@pytest.mark.parametrize("cache", ["grown by cat", "a longer buffer"])
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("P", [20, 900, 4096])
def test_nothing_is_compiled_while_a_text_grows(driver, P, given, cache):
    """Behind a prefix of 900 tokens it grows from one pass into two phases."""
    if "prefix_lengths" in given:
        given = given | {"prefix_lengths": torch.tensor([P - 12, 8, 4], dtype=torch.int32)}
    first = causal_call(Lq=1, Lk=1, P=P, **given)
    buffer = torch.zeros(8, 2, 300, 16, dtype=torch.bfloat16)
    lengths = range(1, 301) if given is GIVEN["plain"] else SOME_LENGTHS
    for kernel in KERNELS:
        kernel.device_caches.clear()
    decode.AHEAD.clear()
    with simulated_gpu.counting(driver) as counts:
        attend(first)
    assert counts.loaded
    with simulated_gpu.counting(driver) as counts:
        for Lk in lengths:
            key = buffer[:, :, :Lk]
            if cache == "grown by cat":
                key = key.contiguous()
            mask = torch.ones(8, Lk, dtype=torch.bool) if "pad" in given else None
            options = first.options._replace(key_padding_mask=mask)
            attend(Call({**first.tensors, "key": key, "value": key}, options))
    assert counts.loaded == []
    if given is GIVEN["plain"]:
        assert len({each.name for each in counts.launches}) == {20: 1, 900: 3, 4096: 2}[P]


@inside
@pytest.mark.parametrize("P", [20, 4096])
@pytest.mark.parametrize("pad", [False, True])
def test_a_static_cache_has_one_plan_while_a_text_grows(driver, P, pad):
    first = causal_call(Lq=1, Lk=300, P=P, pad=pad, in_use=1)
    attend(first)
    with simulated_gpu.counting(driver) as counts:
        for length in range(1, 301):
            attend(causal_call(Lq=1, Lk=300, P=P, pad=pad, in_use=length))
    assert counts.loaded == []
    assert len(PLANS) == 1
