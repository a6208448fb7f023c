"""A frozen model with trainable prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.encoders import to_flat
from fastprefix.hf.patching import (
    activate,
    layer_groups,
    layer_shapes,
    patch_model,
    patched,
    use_prefix,
)
from fastprefix.hf.peft_base import (
    find_base_adapter,
    freeze,
    has_base_adapters,
    load_base_adapter,
    save_base_adapter,
    unwrap,
)
from fastprefix.hf.peft_format import load_adapter, save_adapter
from fastprefix.kv import PrefixKV
from fastprefix.tuning.adapters import DEFAULT, NamedAdapters
from fastprefix.tuning.build import chosen_layers, new_encoder
from fastprefix.tuning.config import PrefixConfig


class PrefixTuningModel(NamedAdapters):
    """Prefix tuning: the base model is frozen, its attention sees a trained prefix.

    The base model is patched in place and stays so. It may hold several prefixes by name, of which
    all rows of a batch use the active one, or each row its own (``prefix_names``). It may also
    hold a LoRA, or another adapter of PEFT's that sits inside the model: a PeftModel is taken for
    its inside, both train, and both are saved and loaded together.

    ``state_dict()`` holds the encoders and what is trained inside the base, so that a trainer's
    checkpoints do not repeat the base; ``save_pretrained`` writes PEFT's format.

    Args:
        model: the base; frozen, but for what PEFT's adapters inside it train.
        config: see :class:`PrefixConfig`.
        tokenizer: the base's; needed for init="text".
        adapter_name: of the first prefix.

    Raises:
        ValueError: init="text" without a tokenizer or for a model that reads no text, groups that
            the model does not have, or a PeftModel with a prompt of its own.
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
        adapter_name: str = DEFAULT,
    ) -> None:
        model = unwrap(model)
        with patched(model):  # left as it was if something is refused
            super().__init__(adapter_name, config, new_encoder(model, config, tokenizer))
            patch_model(model)
        freeze(model)
        self.base_model = model
        self.register_load_state_dict_post_hook(_allow_no_base)
        self.register_state_dict_post_hook(_drop_base)

    def add_adapter(
        self,
        adapter_name: str,
        config: PrefixConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Adds a prefix, neither active nor trained until :meth:`set_adapter`.

        Args:
            adapter_name: a new name.
            config: see :class:`PrefixConfig`.
            tokenizer: the base's; needed for init="text".

        Raises:
            ValueError: the name is in use or cannot be one, or init="text" without a tokenizer.
        """
        self._insert(adapter_name, config, new_encoder(self.base_model, config, tokenizer))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        prefix_names: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward with the prefix; masks, positions and labels are the text's.

        Args:
            input_ids: [B, L].
            attention_mask: [B, L], 0 for padding on either side.
            position_ids: [B, L], counted from 0 at the text's first token.
            inputs_embeds: [B, L, hidden], in place of input_ids.
            labels: [B, L], -100 where no loss is wanted.
            prefix_names: B adapters by name, each row's own, or None for a row without a prefix.
                The active one for all rows if None.
            kwargs: whatever else the base model's forward takes.

        Raises:
            ValueError: prefix_names has an unknown name, or not one for each row.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        kwargs.update({name: value for name, value in given.items() if value is not None})
        if prefix_names is None:
            if self._adapters_disabled:
                return self.base_model(**kwargs)
            active = activate(self.base_model, self._prefix(self.active_adapter))
        else:
            self._check_rows(prefix_names, _batch_size(kwargs))
            named = {name: self._prefix(name) for name in _distinct(prefix_names)}
            if not named:
                return self.base_model(**kwargs)
            active = activate(self.base_model, named, prefix_names)
        return self.base_model(fastprefix=active, **kwargs)

    @torch.no_grad()
    def generate(
        self, *args: Any, prefix_names: Sequence[str | None] | None = None, **kwargs: Any
    ) -> Any:
        """The base model's ``generate()`` with the prefix.

        With a cache unless told otherwise: the Trainer switches it off in the base's config.

        Args:
            args: of the base model's method.
            prefix_names: as in :meth:`forward`, one for each row of the input, however many
                beams or sequences generate() makes of it.
            kwargs: of the base model's method.

        Raises:
            ValueError: see :meth:`forward`.
        """
        kwargs.setdefault("use_cache", True)
        generate: Any = self.base_model.generate  # models for other tasks have none
        if prefix_names is None:
            if self._adapters_disabled:
                return generate(*args, **kwargs)
            with use_prefix(self.base_model, self.export()):
                return generate(*args, **kwargs)
        given = {"inputs": args[0]} if args else kwargs
        self._check_rows(prefix_names, _batch_size(given))
        named = {name: self.export(name) for name in _distinct(prefix_names)}
        if not named:
            return generate(*args, **kwargs)
        with use_prefix(self.base_model, named, prefix_names):
            return generate(*args, **kwargs)

    @torch.no_grad()
    def export(self, adapter_name: str | None = None) -> PrefixKV:
        """A prefix as it stands: no dropout, no parameterisation, no graph.

        Args:
            adapter_name: which; the active one if None.

        Raises:
            ValueError: no adapter of this name.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        self._check_known("adapter_name", [name])
        encoder = self.encoders[name]
        training = encoder.training
        try:
            encoder.eval()
            return self._prefix(name).detach()
        finally:
            encoder.train(training)

    def _prefix(self, adapter_name: str) -> PrefixKV:
        """A prefix with gradients, for all layers: those that have none get length 0."""
        kv: PrefixKV = self.encoders[adapter_name]()
        layers = chosen_layers(self.prefix_configs[adapter_name], self.base_model)
        shapes = layer_shapes(self.base_model)
        return kv if len(layers) == len(shapes) else kv.spread(layers, shapes)

    def save_pretrained(
        self, folder: str | Path, selected_adapters: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Writes the prefixes in PEFT's format; an MLP is dropped, as PEFT does.

        The adapter "default" goes into the folder itself, others into sub-folders of their names.
        An adapter inside the base is written beside each, into its sub-folder "base_model".

        Args:
            folder: made if need be.
            selected_adapters: by name; all if None.

        Raises:
            ValueError: no adapter of a name, or PEFT's format has no place for an encoder-decoder's
                groups or for layers without a prefix; see also
                :func:`fastprefix.hf.peft_format.save_adapter` and
                :func:`fastprefix.hf.peft_base.save_base_adapter`.
        """
        if len(set(layer_groups(self.base_model))) > 1:
            raise ValueError(
                "groups: PEFT's format holds none but a decoder's own attention and not its place; "
                "save this prefix with export().save(file)"
            )
        names = list(self.encoders) if selected_adapters is None else list(selected_adapters)
        self._check_known("selected_adapters", names)
        for name in names:
            place = Path(folder) if name == DEFAULT else Path(folder) / name
            config = self.prefix_configs[name]
            fields = {
                "base_model_name_or_path": getattr(self.base_model, "name_or_path", None) or None,
                "encoder_hidden_size": config.encoder_hidden_size,
                "prefix_projection": config.prefix_projection,
                "task_type": config.task_type,
            }
            save_base_adapter(place, self.base_model)
            save_adapter(place, self.export(name), fields)

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        name_or_folder: str | Path,
        adapter_name: str = DEFAULT,
        *,
        is_trainable: bool = False,
    ) -> PrefixTuningModel:
        """Loads an adapter that fastprefix or PEFT saved, and with it the one inside the base.

        Args:
            model: the base; patched and frozen.
            name_or_folder: a folder, or a repository name on the Hugging Face hub.
            adapter_name: what to call the prefix.
            is_trainable: whether to train it further (directly; an MLP is gone), and with it
                what is inside the base.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: not a prefix-tuning adapter for this model.
        """
        model = unwrap(model)
        with patched(model):  # left as it was if the adapter is refused
            kv, config = _load(name_or_folder, model)
        inside = find_base_adapter(name_or_folder)
        if inside is not None:
            load_base_adapter(model, inside, is_trainable=is_trainable)
        tuned = cls(model, config, adapter_name=adapter_name)
        tuned.encoder.start_from(to_flat(kv))
        if not is_trainable:
            tuned.requires_grad_(False)
        return tuned.train(is_trainable)

    def load_adapter(
        self, name_or_folder: str | Path, adapter_name: str, is_trainable: bool = False
    ) -> None:
        """Adds a prefix that fastprefix or PEFT saved; not active until :meth:`set_adapter`.

        Args:
            name_or_folder: a folder, or a repository name on the Hugging Face hub.
            adapter_name: a new name.
            is_trainable: whether to train it, beside those that are trained.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the name is in use or cannot be one, or not a prefix-tuning adapter for
                this model, or one that was trained with an adapter inside the base, of which
                this base has none.
        """
        kv, config = _load(name_or_folder, self.base_model)
        if find_base_adapter(name_or_folder) is not None and not has_base_adapters(self.base_model):
            raise ValueError(
                f"{name_or_folder}: holds an adapter inside the base, too, which this base lacks; "
                "load both by from_pretrained"
            )
        self.add_adapter(adapter_name, config)
        self.encoders[adapter_name].start_from(to_flat(kv))  # type: ignore[operator]
        self.set_requires_grad(adapter_name, is_trainable)

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


def _load(name_or_folder: str | Path, model: PreTrainedModel) -> tuple[PrefixKV, PrefixConfig]:
    """A saved prefix for a patched model, and a configuration that trains it directly."""
    adapter = load_adapter(name_or_folder, layer_shapes(model))
    config = PrefixConfig(
        num_virtual_tokens=adapter.kv.num_virtual_tokens,
        task_type=adapter.config.get("task_type") or "CAUSAL_LM",
        position_offset=adapter.kv.position_offset,
    )
    return adapter.kv, config


def _distinct(names: Sequence[str | None]) -> list[str]:
    """The names in their order, each once."""
    return [name for name in dict.fromkeys(names) if name is not None]


def _batch_size(inputs: dict[str, Any]) -> int | None:
    """Rows of a call's input; None where it cannot be seen."""
    for name in ("inputs", "input_ids", "inputs_embeds"):
        if isinstance(inputs.get(name), Tensor):
            return inputs[name].shape[0]
    return None


def _trained(model: nn.Module) -> set[str]:
    """Names of the base's parameters that are trained: those of PEFT's adapters inside."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _drop_base(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """What is frozen lives in files of its own: a checkpoint holds encoders and what is trained."""
    start = f"{prefix}base_model."
    kept = _trained(module.base_model)  # type: ignore[arg-type]
    for name in [name for name in state if name.startswith(start)]:
        if name.removeprefix(start) not in kept:
            del state[name]


def _allow_no_base(module: nn.Module, incompatible: Any) -> None:
    """Loading such a checkpoint misses nothing."""
    base: nn.Module = module.base_model  # type: ignore[assignment]
    frozen = {f"base_model.{name}" for name in base.state_dict().keys() - _trained(base)}
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if name[name.find("base_model.") :] not in frozen]
