"""How much two runs of a model differ, and how much of that rounding explains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprefix.hf.checking.trace import Trace
from fastprefix.hf.devices import device_of

# The largest error that is allowed in a layer's output for a token, relative to its norm. It is
# several times the difference between two ways of rounding, and far below the effect of a lost
# token or a wrong position. Models in float64 compute their softmax in float32.
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2}
_TF32, _COARSE = 5e-3, 3e-2


class Judge:
    """Keeps the largest error in the outputs of layers, over all real tokens."""

    def __init__(self, model: PreTrainedModel, trace: Trace, inputs: Mapping[str, Any]) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.trace, self.mask = trace, inputs.get("attention_mask")
        self.tolerance = _tolerance(model)
        self.worst, self.where = 0.0, ""

    def name(self, number: int) -> str:
        """A call's module, for messages."""
        module = self.trace.calls[number].module
        return f"{type(module).__name__} ({self.names[module]})"

    def compare(self, number: int, made: Tensor, want: Tensor) -> None:
        """Compares the output of a call, [B, L, width], with the one that is right."""
        self._note(self.error(number, made, want), self.name(number))

    def final(self, got: Tensor | None, want: Tensor | None) -> None:
        """Compares the outputs of models."""
        if got is None or want is None:
            return
        self._note(_error(got, want, self._real(want)), "the model")

    def error(self, number: int, made: Tensor, want: Tensor) -> float:
        """The largest error of a token, relative to its norm."""
        return _error(made, want, self._real(want))

    def _real(self, want: Tensor) -> Tensor | None:
        mask = self.mask
        if isinstance(mask, Tensor) and mask.shape == want.shape[:2]:
            return mask.to(want.device).bool()
        return None

    def _note(self, error: float, where: str) -> None:
        if error > self.worst or not self.where:
            self.worst, self.where = error, where


def _error(got: Tensor, want: Tensor, real: Tensor | None) -> float:
    if got.shape != want.shape:
        return float("inf")
    got, want = (x.detach().double().reshape(*x.shape[:2], -1) for x in (got, want))
    if real is not None:
        got, want = got[real], want[real]
    if not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    difference = (got - want).nan_to_num(0.0, 0.0, 0.0).norm(dim=-1)
    norms = want.nan_to_num(0.0, 0.0, 0.0).norm(dim=-1)
    scale = norms.clamp(min=0.1 * float(norms.square().mean().sqrt()))  # for tokens near zero
    return float((difference / scale.clamp(min=1e-30)).max()) if norms.numel() else 0.0


def _tolerance(model: PreTrainedModel) -> float:
    """The tolerance for the coarsest arithmetic that a model's layers may use."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} or {model.dtype}
    found = max(_TOLERANCES.get(dtype, _COARSE) for dtype in dtypes)
    if getattr(model, "quantization_method", None) is not None or _quantised(model):
        found = _COARSE
    if found < _TF32 and (
        device_of(model).type != "cpu" or torch.get_float32_matmul_precision() != "highest"
    ):
        found = _TF32
    return found


def _quantised(model: PreTrainedModel) -> bool:
    """Whether some weight is of a tensor subclass with its own arithmetic."""
    plain = (nn.Parameter, Tensor)
    return any(type(parameter.data) not in plain for parameter in model.parameters())
