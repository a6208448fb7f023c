"""A bias or a gate for each query head, which changes how much attention the prefix gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastprefix.arguments import methods_refuse_unknown_arguments

Kind = Literal["bias", "gate"]


@methods_refuse_unknown_arguments
@dataclass(frozen=True, eq=False)
class Reweighting:
    """One number for each query head of each layer that has a prefix.

    A bias is added to all scores of the prefix, after a softcap. Relative to the text's, the
    prefix's weights are then exp(bias) times as large.

    A gate gives the prefix a softmax of its own: out = attention(text) + tanh(gate) *
    attention(prefix) (LLaMA-Adapter, Zhang et al. 2023, arXiv 2303.16199, equations 4 to 6). Sinks
    belong to the text's softmax. With a gate of 0 the model is as without a prefix.

    Attributes:
        kind: "bias" or "gate".
        heads: one float32 [Hq] tensor for each layer; [0] for a layer without a prefix.

    Raises:
        TypeError: heads are not float32 tensors.
        ValueError: the kind is unknown, or a tensor is not [Hq].
    """

    kind: Kind
    heads: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(self.heads))
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: got {self.kind!r}, takes one of {get_args(Kind)}")
        for layer, tensor in enumerate(self.heads):
            if not isinstance(tensor, Tensor) or tensor.dtype is not torch.float32:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"heads[{layer}]: got {got}, takes a float32 tensor")
            if tensor.dim() != 1:
                raise ValueError(f"heads[{layer}]: got shape {list(tensor.shape)}, takes [Hq]")

    @property
    def num_heads(self) -> tuple[int, ...]:
        """The number of query heads, layer by layer; 0 for a layer without a prefix."""
        return tuple(tensor.shape[0] for tensor in self.heads)

    def map(self, change: Callable[[Tensor], Tensor]) -> Reweighting:
        """Applies a function to every layer's tensor."""
        return Reweighting(self.kind, tuple(map(change, self.heads)))

    def check(self, keys: Sequence[Tensor], in_window: bool) -> None:
        """Checks that this fits a prefix.

        Args:
            keys: the prefix's keys, [Hkv, P, D] for each layer.
            in_window: whether the prefix slides out of sliding windows.

        Raises:
            ValueError: it does not fit.
        """
        if len(self.heads) != len(keys):
            raise ValueError(
                f"reweighting: got {len(self.heads)} layers, takes {len(keys)} as the keys"
            )
        for layer, (tensor, key) in enumerate(zip(self.heads, keys, strict=True)):
            Hq, Hkv = tensor.shape[0], key.shape[0]
            if Hq % Hkv != 0 or (Hq == 0 and key.shape[1] > 0):
                raise ValueError(
                    f"reweighting.heads[{layer}]: got shape [{Hq}], takes [Hq], a multiple of the "
                    f"{Hkv} key/value heads"
                )
            if tensor.device != key.device:
                raise ValueError(
                    f"reweighting.heads[{layer}]: got {tensor.device}, takes {key.device} as keys"
                )
        if self.kind == "gate" and in_window:
            raise ValueError(
                "reweighting: got gates with in_window, takes a learned prefix that stays in view: "
                "attended apart it has no place in front of the text to slide from"
            )


def kind_of(reweighting: Reweighting | None) -> Kind | None:
    """The kind of a reweighting; None if there is none."""
    return None if reweighting is None else reweighting.kind
