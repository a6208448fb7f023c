"""Which backend runs: the table of what each backend can do, and the choice that ``auto`` makes.

|                         | reference | composed (cpu) | composed (cuda) | triton         |
|-------------------------|-----------|----------------|-----------------|----------------|
| devices                 | any       | CPU            | CUDA            | CUDA, ROCm     |
| dtypes                  | all four  | all four       | fp32 bf16 fp16  | fp32 bf16 fp16 |
| largest head size       | any       | any            | any             | 256            |
| D != Dv                 | yes       | yes            | yes             | yes            |
| key_lengths             | yes       | yes            | yes             | yes            |
| attn_mask               | yes       | yes            | yes             | yes            |
| attn_mask gradient      | yes       | no             | no              | no             |
| packed prefixes         | yes       | yes            | yes             | yes            |
| cu_seqlens              | yes       | yes            | yes             | yes            |
| sliding_window          | yes       | yes            | yes             | yes            |
| prefix_in_window        | yes       | yes            | yes             | yes            |
| sinks                   | yes       | yes            | yes             | yes            |
| prefix_bias [Hq]        | yes       | yes            | yes             | yes            |
| prefix_bias [Hq, Lq, P] | yes       | yes            | yes             | yes            |
| prefix_bias 3D gradient | yes       | no             | no              | no             |
| softcap                 | yes       | yes            | no              | yes            |
| dropout_p               | yes       | yes            | no              | yes            |
| batch_invariant         | no        | no             | no              | yes            |

The four dtypes are float64, float32, bfloat16 and float16. Every backend can do key_padding_mask,
is_causal, scale, GQA and MQA. triton runs on the CPU, too, in Triton's interpreter. composed is not
for ROCm, whose kernels align causality differently.

:data:`AUTO` lists the backends of each device, and ``auto`` runs the first one that can do
everything that the call needs. On CUDA and ROCm that is triton; on CUDA composed follows, for where
Triton is not installed or a head is too large. On the CPU it is composed. On every device reference
runs the calls that need a gradient of an additive mask or of a bias by column, which no other
backend computes; such a gradient needs memory of Lq x (P + Lk) in any case. A backend that is
requested by name never falls back. Only triton fixes the order of its sums (batch_invariant): the
results of PyTorch's own products depend on the size of the batch.

With dropout_p the weights that are dropped follow from the seed of the call. reference and triton
drop the same ones for the same seed; composed drops others.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fastprefix import options

_ALL = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})

UNEQUAL_HEAD_SIZES = "D != Dv"
# What a call may need beyond the plain arguments, by the names that messages use.
FEATURES: tuple[str, ...] = (UNEQUAL_HEAD_SIZES, *options.FEATURES)

# Gradients that are as large as the scores. Only reference computes them.
LARGE_GRADIENTS = frozenset({"attn_mask gradient", "prefix_bias 3D gradient"})


@dataclass(frozen=True)
class Backend:
    """What a backend can do.

    Attributes:
        devices: device types it runs on, or None for any.
        dtypes: of query, key, value and prefix.
        features: what it can do of :data:`FEATURES`, in any combination.
        max_head_size: largest D and Dv, or None for any.
        elsewhere: by device type, what it can do where that differs.
    """

    devices: frozenset[str] | None
    dtypes: frozenset[torch.dtype]
    features: frozenset[str]
    max_head_size: int | None = None
    elsewhere: Mapping[str, Backend] = field(default_factory=dict)

    def at(self, device: str) -> Backend:
        """What it can do on a device type."""
        return self.elsewhere.get(device, self)


_COMPOSED = frozenset(FEATURES) - LARGE_GRADIENTS - {"batch_invariant"}
_ON_CUDA = Backend(
    frozenset({"cuda"}), _ALL - {torch.float64}, _COMPOSED - {"softcap", "dropout_p"}
)

BACKENDS: dict[str, Backend] = {
    "reference": Backend(None, _ALL, frozenset(FEATURES) - {"batch_invariant"}),
    "composed": Backend(
        frozenset({"cpu"}),
        _ALL,
        _COMPOSED,
        elsewhere={"cuda": _ON_CUDA},
    ),
    "triton": Backend(
        frozenset({"cuda"}),
        _ALL - {torch.float64},
        frozenset(FEATURES) - LARGE_GRADIENTS,
        max_head_size=256,
    ),
}

# What `auto` tries, by device. `reference` comes last where it comes at all: it is a yardstick.
# On CUDA the order of triton and composed waits for a measurement; an order by shape belongs here.
AUTO: dict[str, tuple[str, ...]] = {
    "cpu": ("composed", "reference"),
    "cuda": ("triton", "composed"),
}


# Asked once: PyTorch 2.9's compiler cannot trace the question, which every call of triton has.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def columns() -> dict[str, Backend]:
    """The table by column: a backend, or one for each device on which it can do other things."""
    found = {}
    for name, backend in BACKENDS.items():
        if not backend.elsewhere:
            found[name] = backend
            continue
        for device in sorted((*(backend.devices or ()), *backend.elsewhere)):
            found[f"{name} ({device})"] = backend.at(device)
    return found


def triton_installed() -> bool:
    """Whether Triton can be imported, without importing it."""
    return _TRITON_INSTALLED


def interpreting() -> bool:
    """Whether the environment asks for Triton's interpreter, which runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def has_feature(requested: str, device: str, feature: str) -> bool:
    """Whether every backend that may run a call has a feature.

    Args:
        requested: "auto" or a backend's name.
        device: device type of the tensors.
        feature: one of :data:`FEATURES`.
    """
    names = AUTO.get(device, ()) if requested == "auto" else (requested,)
    return len(names) > 0 and all(feature in BACKENDS[name].at(device).features for name in names)


def refusal(
    name: str, device: str, dtype: torch.dtype, features: frozenset[str], head_size: int
) -> str | None:
    """Why a backend cannot run a call, or None if it can."""
    backend = BACKENDS[name].at(device)
    if name == "composed" and device == "cuda" and torch.version.hip is not None:
        return "it runs on the CPU and on CUDA, not on ROCm"
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
        devices = sorted((*backend.devices, *backend.elsewhere))
        return f"it runs on {', '.join(devices)}, not on {device}"
    if dtype not in backend.dtypes:
        return f"it takes {_dtype_names(backend.dtypes)}, not {_dtype_names([dtype])}"
    if not features <= backend.features:
        return f"it cannot do {', '.join(sorted(features - backend.features))}"
    if backend.max_head_size is not None and head_size > backend.max_head_size:
        return f"it takes head sizes up to {backend.max_head_size}, not {head_size}"
    return None


def choose_backend(
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
        RuntimeError: the requested backend, or all that ``auto`` tries on this device, cannot do
            what the call needs. The message names the backends that can.
    """
    if requested != "auto" and requested not in BACKENDS:
        names = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend: got {requested!r}, takes one of {names}")
    if requested == "auto" and device not in AUTO:
        raise RuntimeError(
            f"backend='auto': no fused backend for device {device!r}; "
            "pass backend='reference' to run plain PyTorch maths there"
        )
    tried = AUTO[device] if requested == "auto" else (requested,)
    if requested == "auto" and not features.isdisjoint(LARGE_GRADIENTS):
        tried = (*(name for name in tried if name != "reference"), "reference")
    refusals: list[str] = []
    for name in tried:
        why_not = refusal(name, device, dtype, features, head_size)
        if why_not is None:
            if requested != "auto":
                return name, "asked for by name"
            if not refusals:
                return name, f"the default on {device}"
            return name, f"in place of the default on {device}: {'; '.join(refusals)}"
        refusals.append(f"{name} cannot run this call: {why_not}")
    able = [
        repr(other)
        for other in BACKENDS
        if refusal(other, device, dtype, features, head_size) is None
    ]
    raise RuntimeError(
        f"backend={requested!r}: {'; '.join(refusals)}. "
        f"Backends that can: {', '.join(able) or 'none'}"
    )


def _dtype_names(dtypes: frozenset[torch.dtype] | list[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
