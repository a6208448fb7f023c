"""What the figures were measured on: device, driver, versions, commit, and the device's peaks."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

import roofline
from fastprefix.bench.records import installed, output, source

from .records import run_units

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "transformers", "peft", "flashinfer-python", "flash-attn")
GIB = 1 << 30


def main(place: str) -> None:
    """The facts, and on a device its peaks."""
    units = [("about", 0.0, about)]
    if not place:
        units.append(("peaks", 5.0, peaks))
    run_units(units)


def about() -> dict[str, Any]:
    """Facts that cost nothing."""
    found: dict[str, Any] = {
        "device": "none: Triton's interpreter on the CPU",
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "cuda": torch.version.cuda, "hip": torch.version.hip,
        **source(ROOT),
    }  # fmt: skip
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": output("nvidia-smi", "--query-gpu=clocks.max.sm,clocks.max.mem,power.limit",
                              "--format=csv,noheader"),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / GIB, 1),
            "l2_bytes": properties.L2_cache_size,
            "data_sheet": data_sheet(properties.name),
        }  # fmt: skip
    return found


def data_sheet(name: str) -> dict[str, Any] | None:
    """Peak rates from the vendor, of the longest device name that this one contains."""
    words = set(name.upper().replace("-", " ").split())
    for device in roofline.DEVICES:
        model = device.name.upper().split()[0 if "RTX" not in device.name else 1]
        if model in words:
            return {
                "tbytes_per_s": device.gigabytes_per_s / 1e3,
                "tflop_per_s": device.bf16_teraflops,
                "source": device.source,
            }
    return None


def peaks() -> dict[str, Any]:
    """What the device reaches: bytes of a large copy, FLOP of a large bf16 product."""
    source, target = (torch.empty(2 * GIB, dtype=torch.uint8, device="cuda") for _ in range(2))
    n = 8192
    a, b = (torch.randn(n, n, device="cuda").bfloat16() for _ in range(2))

    def fastest(call: Any) -> float:
        times = []
        for _ in range(12):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return sorted(times[2:])[len(times[2:]) // 2]

    return {
        "tbytes_per_s": 2 * source.numel() / fastest(lambda: target.copy_(source)) / 1e12,
        "tflop_per_s": 2 * n**3 / fastest(lambda: a @ b) / 1e12,
    }
