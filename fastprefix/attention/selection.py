"""Which backend runs: the one table of what each can do, and the choice that ``auto`` makes.

| backend   | devices                            | dtypes              | attn_mask | D != Dv |
|-----------|------------------------------------|---------------------|-----------|---------|
| reference | any                                | fp64 fp32 bf16 fp16 | yes       | yes     |
| composed  | CPU                                | fp64 fp32 bf16 fp16 | yes       | yes     |
| triton    | CUDA, ROCm; CPU in the interpreter | fp32 bf16 fp16      | no        | no      |
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

_ALL = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Backend:
    """What a backend can do.

    Attributes:
        devices: device types it runs on, or None for any.
        dtypes: of query, key, value and prefix.
        features: arguments beyond the plain ones, by name.
        max_head_size: largest D and Dv, or None for any.
    """

    devices: frozenset[str] | None
    dtypes: frozenset[torch.dtype]
    features: frozenset[str]
    max_head_size: int | None = None


BACKENDS: dict[str, Backend] = {
    "reference": Backend(None, _ALL, frozenset({"attn_mask", "D != Dv"})),
    "composed": Backend(frozenset({"cpu"}), _ALL, frozenset({"attn_mask", "D != Dv"})),
    "triton": Backend(frozenset({"cuda"}), _ALL - {torch.float64}, frozenset(), max_head_size=256),
}

# What `auto` runs, by device. `reference` is never chosen: it is a yardstick, and its memory
# grows with Lq x (P + Lk).
AUTO: dict[str, str] = {"cpu": "composed", "cuda": "triton"}


def triton_installed() -> bool:
    """Whether Triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's interpreter is asked for, which runs the kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def refusal(
    name: str, device: str, dtype: torch.dtype, features: frozenset[str], head_size: int
) -> str | None:
    """Why a backend cannot run a call, or None if it can."""
    backend = BACKENDS[name]
    if name == "triton":
        if not triton_installed():
            return "Triton is not installed"
        if device == "cpu" and not interpreting():
            return (
                "it runs on CUDA and ROCm devices; on the CPU only in Triton's interpreter "
                "(set TRITON_INTERPRET=1 before Triton is imported)"
            )
    on_cpu = name == "triton" and device == "cpu"
    if backend.devices is not None and device not in backend.devices and not on_cpu:
        return f"it runs on {', '.join(sorted(backend.devices))}, not on {device}"
    if dtype not in backend.dtypes:
        return f"it takes {_dtype_names(backend.dtypes)}, not {_dtype_names([dtype])}"
    missing = sorted(features - backend.features)
    if missing:
        return f"it cannot do {', '.join(missing)}"
    if backend.max_head_size is not None and head_size > backend.max_head_size:
        return f"it takes head sizes up to {backend.max_head_size}, not {head_size}"
    return None


def choose(
    requested: str, device: str, dtype: torch.dtype, features: frozenset[str], head_size: int
) -> tuple[str, str]:
    """The backend that runs, and why.

    Args:
        requested: "auto" or a backend's name; a named backend never falls back.
        device: device type of the tensors.
        dtype: of query, key, value and prefix.
        features: names of the features that the call needs, as in :data:`BACKENDS`.
        head_size: the larger of D and Dv.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the requested backend, or the one that ``auto`` stands for on this device,
            cannot do what the call needs. The message names the backends that can.
    """
    if requested != "auto" and requested not in BACKENDS:
        names = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend: got {requested!r}, takes one of {names}")
    if requested == "auto":
        if device not in AUTO:
            raise RuntimeError(
                f"backend='auto': no fused backend for device {device!r}; "
                "pass backend='reference' to run plain PyTorch maths there"
            )
        name, reason = AUTO[device], f"the default on {device}"
    else:
        name, reason = requested, "asked for by name"
    why_not = refusal(name, device, dtype, features, head_size)
    if why_not is None:
        return name, reason
    able = [
        repr(other)
        for other in BACKENDS
        if refusal(other, device, dtype, features, head_size) is None
    ]
    raise RuntimeError(
        f"backend={requested!r}: {name} cannot run this call: {why_not}. "
        f"Backends that can: {', '.join(able) or 'none'}"
    )


def _dtype_names(dtypes: frozenset[torch.dtype] | list[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
