"""A frozen model with a trainable prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
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
from fastprefix.hf.peft_format import load_adapter, save_adapter
from fastprefix.hf.prefill import text_keys_values
from fastprefix.kv import PrefixKV
from fastprefix.tuning.config import PrefixConfig


class PrefixTuningModel(nn.Module):
    """Prefix tuning: the base model is frozen, its attention sees a trained prefix.

    The base model is patched in place and stays so. ``state_dict()`` holds the encoder alone, so
    that a trainer's checkpoints do not repeat the base; ``save_pretrained`` writes PEFT's format.

    Args:
        model: the base; all its parameters are frozen.
        config: see :class:`PrefixConfig`.
        tokenizer: the base's; needed for init="text".

    Raises:
        ValueError: init="text" without a tokenizer, or groups that the model does not have.
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
        super().__init__()
        start = _initial_ids(config, model, tokenizer)
        with patched(model):  # left as it was if the configuration is refused
            self.layers = _layers(config, model)
            self.shapes = layer_shapes(model)
            P, offset = config.num_virtual_tokens, config.position_offset
            offset = default_offset(model, P) if offset is None else offset
        patch_model(model)
        model.requires_grad_(False)
        self.base_model = model
        self.prefix_config = config
        shapes = [self.shapes[layer] for layer in self.layers]
        self.encoder: DirectEncoder | MLPEncoder
        if config.prefix_projection:
            hidden = model.config.get_text_config().hidden_size
            self.encoder = MLPEncoder(
                shapes,
                P,
                embedding_size=hidden,
                hidden_size=config.encoder_hidden_size or hidden,
                position_offset=offset,
                dropout=config.dropout,
                init_std=config.init_std,
            )
        else:
            self.encoder = DirectEncoder(
                shapes,
                P,
                position_offset=offset,
                dropout=config.dropout,
                init_std=config.init_std,
            )
        self.encoder.to(model.device)
        if start is not None:
            self.encoder.start_from(to_flat(text_keys_values(model, start).select(self.layers)))
        self.register_load_state_dict_post_hook(_allow_no_base)
        self.register_state_dict_post_hook(_drop_base)

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
        kv = self.encoder()
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

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable parameters and all parameters, the base's included."""
        parameters = list(self.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        return trainable, sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Prints both numbers and their ratio, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Writes the prefix in PEFT's format; an MLP is dropped, as PEFT does.

        Raises:
            ValueError: PEFT's format has no place for an encoder-decoder's groups or for layers
                without a prefix, or see :func:`fastprefix.hf.peft_format.save_adapter`.
        """
        config = self.prefix_config
        if len(set(layer_groups(self.base_model))) > 1:
            raise ValueError(
                "groups: PEFT's format holds none but a decoder's own attention and not its place; "
                "save this prefix with export().save(file)"
            )
        fields = {
            "base_model_name_or_path": getattr(self.base_model, "name_or_path", None) or None,
            "encoder_hidden_size": config.encoder_hidden_size,
            "prefix_projection": config.prefix_projection,
            "task_type": config.task_type,
        }
        save_adapter(folder, self.export(), fields)

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
            shapes = layer_shapes(model)
        adapter = load_adapter(name_or_folder, shapes)
        config = PrefixConfig(
            num_virtual_tokens=adapter.kv.num_virtual_tokens,
            task_type=adapter.config.get("task_type") or "CAUSAL_LM",
            position_offset=adapter.kv.position_offset,
        )
        tuned = cls(model, config)
        tuned.encoder.start_from(to_flat(adapter.kv))
        tuned.requires_grad_(False)
        tuned.encoder.requires_grad_(is_trainable)
        return tuned.train(is_trainable)

    # What transformers.Trainer asks of a model.

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.base_model.config

    @property
    def generation_config(self) -> Any:
        """The base model's generation configuration."""
        return self.base_model.generation_config

    @property
    def device(self) -> torch.device:
        """The base model's device."""
        return self.base_model.device

    @property
    def dtype(self) -> torch.dtype:
        """The base model's dtype; the encoder keeps float32."""
        return self.base_model.dtype

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base's loss takes num_items_in_batch, for gradient accumulation."""
        return getattr(self.base_model, "accepts_loss_kwargs", True)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether the backward recomputes activations."""
        return self.base_model.is_activation_checkpointing

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recomputes activations in the backward instead of keeping them.

        Args:
            activation_checkpointing_kwargs: of ``torch.utils.checkpoint.checkpoint``; the
                reentrant variant is refused by the next forward.
            kwargs: of the base model's method of this name.
        """
        chosen = activation_checkpointing_kwargs or {"use_reentrant": False}
        self.base_model.activation_checkpointing_enable(chosen, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Keeps activations again."""
        self.base_model.activation_checkpointing_disable()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of :meth:`activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of :meth:`activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()


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


def _initial_ids(
    config: PrefixConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Tensor | None:
    """[P] token ids whose keys and values the prefix starts from; None for a random start."""
    P = config.num_virtual_tokens
    if config.init == "random":
        return None
    if config.init == "vocab":
        return torch.randint(_embedding_weight(model).shape[0], (P,))
    if tokenizer is None:
        raise ValueError("tokenizer: got None, init='text' needs one")
    ids = torch.tensor(tokenizer(config.init_text)["input_ids"])
    if len(ids) == 0:
        raise ValueError(f"init_text: {config.init_text!r} has no tokens")
    return ids.repeat(-(-P // len(ids)))[:P]


def _embedding_weight(model: PreTrainedModel) -> Tensor:
    """[vocabulary, hidden]."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def _drop_base(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """The base is frozen and lives in its own files: a checkpoint holds the encoder alone."""
    for name in [name for name in state if name.startswith(f"{prefix}base_model.")]:
        del state[name]


def _allow_no_base(module: nn.Module, incompatible: Any) -> None:
    """Loading such a checkpoint misses nothing."""
    base = {f"base_model.{name}" for name in module.base_model.state_dict()}  # type: ignore
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if name[name.find("base_model.") :] not in base]
