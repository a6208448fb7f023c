"""A frozen model with a trainable prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.encoders import Encoder
from fastprefix.hf.patching import (
    activate,
    layer_groups,
    layer_shapes,
    patch_model,
    patched,
    use_prefix,
)
from fastprefix.hf.peft_format import PREFIX_KINDS, load_adapter, save_adapter
from fastprefix.kv import PrefixKV
from fastprefix.tuning.base import TunedModel, load_heads, saved_heads
from fastprefix.tuning.build import new_encoder
from fastprefix.tuning.config import PrefixConfig


class PrefixTuningModel(TunedModel):
    """Prefix tuning: the base model is frozen, its attention sees a trained prefix.

    The base model is patched in place and stays so. ``state_dict()`` holds the encoder alone, so
    that a trainer's checkpoints do not repeat the base; ``save_pretrained`` writes PEFT's format.

    Args:
        model: the base; all its parameters are frozen.
        config: see :class:`PrefixConfig`.
        tokenizer: the base's; needed for init="text".

    Raises:
        ValueError: the config does not fit the model, or init="text" without a tokenizer.
        FileNotFoundError: config.init_prefix does not exist.
        UnsupportedModelError: see :func:`fastprefix.patch_model`.

    Example:
        >>> tuned = PrefixTuningModel(model, PrefixConfig(num_virtual_tokens=32))
        >>> Trainer(tuned, arguments, train_dataset=data).train()
        >>> tuned.save_pretrained("adapter")
    """

    encoder: Encoder

    def __init__(
        self,
        model: PreTrainedModel,
        config: PrefixConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        with patched(model):  # left as it was if something is refused
            encoder = new_encoder(model, config, tokenizer)
            patch_model(model)
        super().__init__(model)
        self.prefix_config = config
        self.encoder = encoder
        self.train_heads(config.modules_to_save, config.task_type)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward with the prefix; masks, positions and labels are the text's.

        Args:
            input_ids: [B, L].
            attention_mask: [B, L], 0 for padding on either side.
            position_ids: [B, L], counted from 0 at the text's first token.
            inputs_embeds: [B, L, hidden], in place of input_ids.
            labels: [B, L], -100 where no loss is wanted.
            kwargs: whatever else the base model's forward takes.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        kwargs.update({name: value for name, value in given.items() if value is not None})
        return self.base_model(fastprefix=activate(self.base_model, self._prefix()), **kwargs)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's ``generate()`` with the prefix.

        With a cache unless told otherwise: the Trainer switches it off in the base's config.
        """
        kwargs.setdefault("use_cache", True)
        generate: Any = self.base_model.generate  # models for other tasks have none
        with use_prefix(self.base_model, self.export()):
            return generate(*args, **kwargs)

    @torch.no_grad()
    def export(self) -> PrefixKV:
        """The prefix as it stands: no dropout, no parameterisation, no graph."""
        training = self.encoder.training
        try:
            self.encoder.eval()
            return self._prefix().detach()
        finally:
            self.encoder.train(training)

    def _prefix(self) -> PrefixKV:
        """The prefix with gradients."""
        kv = self.encoder()
        return replace(kv, in_window=True) if self.prefix_config.prefix_in_window else kv

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Writes the prefix, and heads trained beside it, in PEFT's format.

        An MLP is dropped, as PEFT does. What PEFT's format cannot hold goes into a format that
        only :meth:`from_pretrained` reads; see :mod:`fastprefix.hf.peft_format`.
        """
        config = self.prefix_config
        fields = {
            "base_model_name_or_path": getattr(self.base_model, "name_or_path", None) or None,
            "modules_to_save": self.head_names(),
            "task_type": config.task_type,
        }
        if config.peft_type == "PREFIX_TUNING":
            fields["encoder_hidden_size"] = config.encoder_hidden_size
            fields["prefix_projection"] = config.prefix_projection
        else:
            fields["num_frozen_tokens"] = config.num_frozen_tokens
        save_adapter(
            folder,
            self.export(),
            fields,
            kind=config.peft_type,
            heads=self.heads(),
            groups=layer_groups(self.base_model),
        )

    @classmethod
    def from_pretrained(
        cls, model: PreTrainedModel, name_or_folder: str | Path, *, is_trainable: bool = False
    ) -> PrefixTuningModel:
        """Loads an adapter that fastprefix or PEFT saved.

        Args:
            model: the base; patched and frozen.
            name_or_folder: a folder, or a repository name on the Hugging Face hub.
            is_trainable: whether to train the prefix further (directly; an MLP is gone).

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: not a prefix-tuning adapter for this model.
        """
        with patched(model):  # left as it was if the adapter is refused
            adapter = load_adapter(name_or_folder, layer_shapes(model), layer_groups(model))
            activate(model, adapter.kv)  # refuses what the model cannot run
        kind = adapter.config["peft_type"]
        lengths = [key.shape[1] for key in adapter.kv.keys]
        config = PrefixConfig(
            num_virtual_tokens=adapter.kv.num_virtual_tokens,
            layer_lengths=None if len(set(lengths)) == 1 else lengths,
            task_type=adapter.config.get("task_type"),
            modules_to_save=saved_heads(adapter.config, adapter.heads),
            num_frozen_tokens=adapter.config.get("num_frozen_tokens", 0),
            position_offset=adapter.kv.position_offset,
            prefix_in_window=adapter.kv.in_window,
            peft_type=kind if kind in PREFIX_KINDS else "PREFIX_TUNING",
        )
        load_heads(model, adapter.heads)
        tuned = cls(model, config)
        tuned.encoder.start_from(tuned.encoder.layout.to_flat(adapter.kv))
        if not is_trainable:
            tuned.requires_grad_(False)
        return tuned.train(is_trainable)
