"""A frozen model with a trainable prefix."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.encoders import DirectEncoder, MLPEncoder, to_flat
from fastprefix.hf.patching import (
    activate,
    default_offset,
    layer_groups,
    layer_shapes,
    patch_model,
    patched,
    use_prefix,
)
from fastprefix.hf.peft_format import PREFIX_KINDS, load_adapter, save_adapter
from fastprefix.hf.prefill import text_keys_values
from fastprefix.kv import PrefixKV
from fastprefix.tuning.base import (
    TunedModel,
    initial_ids,
    load_heads,
    saved_heads,
)
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
        ValueError: init="text" without a tokenizer or for a model that reads no text, or groups
            that the model does not have.
        UnsupportedModelError: see :func:`fastprefix.patch_model`.

    Example:
        >>> tuned = PrefixTuningModel(model, PrefixConfig(num_virtual_tokens=32))
        >>> Trainer(tuned, arguments, train_dataset=data).train()
        >>> tuned.save_pretrained("adapter")
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: PrefixConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        start = initial_ids(config, model, tokenizer)
        with patched(model):  # left as it was if the configuration is refused
            layers, shapes = _layers(config, model), layer_shapes(model)
            P, offset = config.num_virtual_tokens, config.position_offset
            offset = default_offset(model, P) if offset is None else offset
        patch_model(model)
        super().__init__(model)
        self.prefix_config = config
        self.layers, self.shapes = layers, shapes
        chosen = [self.shapes[layer] for layer in self.layers]
        self.encoder: DirectEncoder | MLPEncoder
        if config.prefix_projection:
            hidden = model.config.get_text_config().hidden_size
            self.encoder = MLPEncoder(
                chosen,
                P,
                embedding_size=hidden,
                hidden_size=config.encoder_hidden_size or hidden,
                position_offset=offset,
                dropout=config.dropout,
                init_std=config.init_std,
            )
        else:
            self.encoder = DirectEncoder(
                chosen,
                P,
                position_offset=offset,
                dropout=config.dropout,
                init_std=config.init_std,
            )
        self.encoder.to(model.device)
        if start is not None:
            self.encoder.start_from(to_flat(text_keys_values(model, start).select(self.layers)))
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
        return self.base_model(fastprefix=activate(self.base_model, self.prefix()), **kwargs)

    def prefix(self) -> PrefixKV:
        """The prefix, with gradients, for all layers: those that have none get length 0."""
        kv: PrefixKV = self.encoder()
        if self.prefix_config.prefix_in_window:
            kv = replace(kv, in_window=True)
        if len(self.layers) == len(self.shapes):
            return kv
        return kv.spread(self.layers, self.shapes)

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
            return self.prefix().detach()
        finally:
            self.encoder.train(training)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Writes the prefix, and heads trained beside it, in PEFT's format.

        An MLP is dropped, as PEFT does. What PEFT's format cannot hold goes into a format that
        only :meth:`from_pretrained` reads; see :mod:`fastprefix.hf.peft_format`. Warns where PEFT
        computes something else with it for long texts.
        """
        config = self.prefix_config
        if not config.prefix_in_window and _has_windows(self.base_model):
            warnings.warn(
                f"{type(self.base_model).__name__} has sliding windows, out of which PEFT lets a "
                "prefix slide: with texts that are longer its results are not ours. "
                "PrefixConfig(prefix_in_window=True) trains a prefix that slides here too",
                stacklevel=2,
            )
        fields = {
            "base_model_name_or_path": getattr(self.base_model, "name_or_path", None) or None,
            "modules_to_save": self.head_names(),
            "task_type": config.task_type,
        }
        if config.peft_type == "PREFIX_TUNING":
            fields["encoder_hidden_size"] = config.encoder_hidden_size
            fields["prefix_projection"] = config.prefix_projection
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
            groups = layer_groups(model)
            adapter = load_adapter(name_or_folder, layer_shapes(model), groups)
            activate(model, adapter.kv)  # refuses what the model cannot run
        frozen = adapter.config.get("num_frozen_tokens", 0)
        if is_trainable and frozen:
            raise NotImplementedError(
                f"is_trainable: got True for an adapter whose first {frozen} tokens are frozen, "
                "which is not supported yet"
            )
        kind = adapter.config["peft_type"]
        config = PrefixConfig(
            num_virtual_tokens=adapter.kv.num_virtual_tokens,
            task_type=adapter.config.get("task_type"),
            modules_to_save=saved_heads(adapter.config, adapter.heads),
            position_offset=adapter.kv.position_offset,
            groups=tuple(
                dict.fromkeys(
                    group
                    for group, key in zip(groups, adapter.kv.keys, strict=True)
                    if key.shape[1]
                )
            ),
            prefix_in_window=adapter.kv.in_window,
            peft_type=kind if kind in PREFIX_KINDS else "PREFIX_TUNING",
        )
        load_heads(model, adapter.heads)
        tuned = cls(model, config)
        tuned.encoder.start_from(to_flat(adapter.kv.select(tuned.layers)))
        if not is_trainable:
            tuned.requires_grad_(False)
        return tuned.train(is_trainable)


def _has_windows(model: PreTrainedModel) -> bool:
    """Whether any layer of a model sees a part of the text alone."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def _layers(config: PrefixConfig, model: PreTrainedModel) -> tuple[int, ...]:
    """Which attention layers of a patched model get a prefix."""
    groups = layer_groups(model)
    missing = set(config.groups or ()) - set(groups)
    if missing:
        raise ValueError(
            f"groups: got {config.groups!r}, takes some of {tuple(dict.fromkeys(groups))}, which "
            f"this {type(model).__name__} has"
        )
    return tuple(
        layer
        for layer, group in enumerate(groups)
        if config.groups is None or group in config.groups
    )
