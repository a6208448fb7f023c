"""Recording what happens to a prefix while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastprefix.arguments import check_type, methods_refuse_unknown_arguments
from fastprefix.encoders import Encoder
from fastprefix.hf.mass import attention_mass
from fastprefix.kv import PrefixKV
from fastprefix.tuning.callbacks.trained_encoders import trained_encoders


@methods_refuse_unknown_arguments
class PrefixMonitor(TrainerCallback):
    """Records gradient norms for each layer, and the prefix's attention for each layer and head.

    There is an entry for each loss that the Trainer logs. Gradients are those of the keys and
    values, also if a network computes them, in the latest step and before clipping. The attention
    is measured on one batch, in an additional forward.

    Args:
        batch: the model's inputs on which the attention is measured; None to leave that out.

    Attributes:
        history: dicts with ``step``, ``loss`` and ``prefix_grad_norm`` (one number for each layer,
            0 for a layer without a prefix). With a batch also ``attention_mass``: for each layer a
            list with the mean share of the attention that each query head gives to the prefix.

    Raises:
        TypeError: batch is no dict.
    """

    def __init__(self, batch: dict[str, Tensor] | None = None) -> None:
        if batch is not None:
            check_type("batch", batch, Mapping, "a dict of a forward's inputs, or None")
        self.batch = batch
        self.history: list[dict[str, Any]] = []
        self._norms: list[float] = []
        self._gradients: dict[tuple[int, int], Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts to watch the encoder's keys and values.

        Raises:
            ValueError: the model has no trained prefix, or several.
        """
        encoders = trained_encoders(kwargs["model"])
        if len(encoders) > 1:
            raise ValueError(f"model: got {len(encoders)} trained prefixes, takes one")
        self._handles = [encoders[0].register_forward_hook(self._watch)]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops watching."""
        while self._handles:
            self._handles.pop().remove()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Computes the norms of this step's gradients, accumulated over its batches."""
        squares = [0.0] * len(trained_encoders(kwargs["model"])[0].layout.shapes)
        for (slot, _), gradient in self._gradients.items():
            squares[slot] += gradient.double().square().sum().item()
        self._norms = [square**0.5 for square in squares]
        self._gradients.clear()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds an entry."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        entry: dict[str, Any] = {"step": state.global_step, "loss": logs["loss"]}
        entry["prefix_grad_norm"] = self._norms
        if self.batch is not None:
            model: Any = kwargs["model"]
            batch = {name: tensor.to(model.device) for name, tensor in self.batch.items()}
            mass = attention_mass(model.base_model, model.export(), **batch)
            entry["attention_mass"] = [heads.tolist() for heads in mass]
        self.history.append(entry)

    def _watch(self, encoder: nn.Module, args: tuple[Any, ...], kv: PrefixKV) -> None:
        assert isinstance(encoder, Encoder)
        if not torch.is_grad_enabled():
            return
        for part, tensors in enumerate((kv.keys, kv.values)):
            for slot, tensor in enumerate(tensors):
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad, place=(slot, part): self._add(place, grad))

    def _add(self, place: tuple[int, int], gradient: Tensor) -> None:
        known = self._gradients.get(place)
        self._gradients[place] = gradient.detach() if known is None else known + gradient
