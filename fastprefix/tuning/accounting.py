"""Parameters and bytes of a tuned model, counted as in the papers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastprefix.arguments import methods_refuse_unknown_arguments, refuses_unknown_arguments
from fastprefix.tuning.model_card import CARD_FILE
from fastprefix.tuning.prompt_model import PromptTuningModel


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class ParameterCount:
    """What a tuned model costs, compared with full fine-tuning.

    Attributes:
        base: the base model's parameters, shared ones counted once. Full fine-tuning trains all.
        trainable: the parameters that are trained, including a network that computes the prefix.
        exported: the numbers that are saved, without the network: the prefix's keys and values, or
            the prompt's embeddings.
        bytes_on_disk: the bytes of all files that ``save_pretrained`` writes, without the card.
        base_bytes: the bytes of the base's parameters in their dtype.
    """

    base: int
    trainable: int
    exported: int
    bytes_on_disk: int
    base_bytes: int

    @property
    def trainable_share(self) -> float:
        """The trained share of the base's parameters, as in "0.1%" of Li and Liang (2021)."""
        return self.trainable / self.base

    @property
    def exported_share(self) -> float:
        """The exported numbers as a share of the base's parameters."""
        return self.exported / self.base

    @property
    def reduction(self) -> float:
        """How many times fewer parameters a task needs than with a fine-tuned copy of the base."""
        return self.base / self.exported

    @property
    def disk_reduction(self) -> float:
        """How many times fewer bytes a task needs than with a fine-tuned copy of the base."""
        return self.base_bytes / self.bytes_on_disk

    def __str__(self) -> str:
        """All of it in one line."""
        return (
            f"trainable {self.trainable:,d} ({self.trainable_share:.4%} of {self.base:,d}) | "
            f"exported {self.exported:,d} ({self.exported_share:.4%}, {self.reduction:,.0f}x fewer "
            f"than full fine-tuning) | {self.bytes_on_disk:,d} bytes on disk "
            f"({self.disk_reduction:,.0f}x fewer)"
        )


@refuses_unknown_arguments
def count_parameters(tuned: Any) -> ParameterCount:
    """Counts a tuned model; to count bytes, it saves the model to a temporary folder.

    Args:
        tuned: a :class:`PrefixTuningModel` or a :class:`PromptTuningModel`.
    """
    base: nn.Module = tuned.base_model
    if isinstance(tuned, PromptTuningModel):
        exported = tuned.export_embeddings().numel()
    else:
        kv = tuned.export()
        exported = sum(tensor.numel() for tensor in kv.tensors)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files if file.name != CARD_FILE)
    return ParameterCount(
        base=sum(p.numel() for p in base.parameters()),
        trainable=sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        exported=exported,
        bytes_on_disk=size,
        base_bytes=sum(p.numel() * p.element_size() for p in base.parameters()),
    )
