"""A frozen model with trainable prefixes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.encoders import Encoder
from fastprefix.hf.patching import (
    Fallback,
    activate,
    check_prefix,
    layer_groups,
    layer_shapes,
    layer_sources,
    patch_model,
    patched,
    use_prefix,
)
from fastprefix.hf.peft_base import (
    find_base_adapter,
    is_base_adapter,
    load_base_adapter,
    save_base_adapter,
    unwrap,
)
from fastprefix.hf.peft_format import PREFIX_KINDS, Adapter, load_adapter, save_adapter
from fastprefix.kv import PrefixKV
from fastprefix.kv.reweighting import kind_of
from fastprefix.tuning.adapters import DEFAULT, NamedAdapters
from fastprefix.tuning.base import load_heads, saved_heads, with_inputs_of_bases
from fastprefix.tuning.build import new_encoder
from fastprefix.tuning.config import PrefixConfig

# What trl's trainers call the adapter that holds the policy as it was before they train it.
REFERENCE = "ref"


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
        check: see :func:`fastprefix.patch_model`.

    Raises:
        ValueError: the config does not fit the model, init="text" without a tokenizer, or a
            PeftModel with a prompt of its own.
        FileNotFoundError: config.init_prefix does not exist.
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
        *,
        check: bool = True,
    ) -> None:
        model = unwrap(model)
        with patched(model, config.fallback, check=check):  # left as it was if it is refused
            encoder = new_encoder(model, config, tokenizer)
            check_prefix(model)
            patch_model(model, fallback=config.fallback)
        super().__init__(model, adapter_name, config, encoder)
        self.train_heads(config.modules_to_save, config.task_type)

    def add_adapter(
        self,
        adapter_name: str,
        config: PrefixConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Adds a prefix, neither active nor trained until :meth:`set_adapter`.

        A head that is trained beside prefixes is the base's own, and so the same for all of them.

        The name "ref" is trl's: with the configuration of "default" itself it is a copy of that
        adapter as it stands, of which its trainers make their reference.

        Args:
            adapter_name: a new name.
            config: see :class:`PrefixConfig`.
            tokenizer: the base's; needed for init="text".

        Raises:
            ValueError: the name is in use or cannot be one, init="text" without a tokenizer, or a
                copy for trl of a model in which more is trained than its prefixes.
        """
        if adapter_name == REFERENCE and config is self.prefix_configs.get(DEFAULT):
            self._check_new(adapter_name)
            self._check_reference()
            encoder = copy.deepcopy(self.encoders[DEFAULT])
            assert isinstance(encoder, Encoder)
            self._insert(adapter_name, config, encoder)
            return
        self._insert(adapter_name, config, new_encoder(self.base_model, config, tokenizer))

    def _check_reference(self) -> None:
        """A reference differs from the model in its prefix alone."""
        inside = [name for name, _ in self.base_model.named_parameters() if ".default." in name]
        more = [*self._heads, *inside[:1]]
        if more:
            raise ValueError(
                f"ref_model: got None for a model in which {more[0]} is trained beside the prefix, "
                "or may be; takes a model to compare with, where the trainer has that argument, "
                "for a copy of the prefix would be a reference that changes"
            )

    @property
    def loss_type(self) -> str | None:
        """The base's: for which labels the Trainer counts the tokens that the loss averages."""
        return getattr(self.base_model, "loss_type", None)

    @with_inputs_of_bases
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
            prefix_names: B adapters by name, each row's own (each sequence's, if they are packed),
                or None for a row without a prefix. The active one for all rows if None.
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
            # packed sequences are counted where they run
            self._check_rows(prefix_names, None if _may_be_packed(kwargs) else _batch_size(kwargs))
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
        """A prefix with gradients, for all layers: those that have none get length 0.

        Of an encoder that FSDP sharded, outside its forward, the whole: all ranks make this call.
        """
        kv: PrefixKV = _whole(self.encoders[adapter_name])
        slides = self.prefix_configs[adapter_name].prefix_in_window
        return replace(kv, in_window=True) if slides else kv

    def save_pretrained(
        self, folder: str | Path, selected_adapters: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Writes the prefixes, and heads trained beside them, in PEFT's format.

        A network is dropped, as PEFT does. What PEFT's format cannot hold goes into a format that
        only :meth:`from_pretrained` reads; see :mod:`fastprefix.hf.peft_format`. Warns where PEFT
        computes something else with it for long texts.

        The adapter "default" goes into the folder itself, others into sub-folders of their names.
        An adapter inside the base is written beside each, into its sub-folder "base_model".

        Args:
            folder: made if need be.
            selected_adapters: by name; all if None.

        Raises:
            ValueError: no adapter of a name; see also
                :func:`fastprefix.hf.peft_format.save_adapter` and
                :func:`fastprefix.hf.peft_base.save_base_adapter`.
        """
        names = list(self.encoders) if selected_adapters is None else list(selected_adapters)
        self._check_known("selected_adapters", names)
        for name in names:
            place = Path(folder) if name == DEFAULT else Path(folder) / name
            config = self.prefix_configs[name]
            if not config.prefix_in_window and _has_windows(self.base_model):
                warnings.warn(
                    f"{type(self.base_model).__name__} has sliding windows, out of which PEFT lets "
                    "a prefix slide: with texts that are longer its results are not ours. "
                    "PrefixConfig(prefix_in_window=True) trains a prefix that slides here too",
                    stacklevel=2,
                )
            fields = {
                "base_model_name_or_path": getattr(self.base_model, "name_or_path", None) or None,
                "modules_to_save": self.head_names(),
                "num_frozen_tokens": config.num_frozen_tokens,
                "task_type": config.task_type,
            }
            if config.prefix_bias is not None:
                fields["prefix_bias"] = config.prefix_bias
            if config.peft_type == "PREFIX_TUNING":
                fields["encoder_hidden_size"] = config.encoder_hidden_size
                fields["prefix_projection"] = config.prefix_projection
            save_base_adapter(place, self.base_model)
            save_adapter(
                place,
                self.export(name),
                fields,
                kind=config.peft_type,
                heads=self.heads(),
                groups=layer_groups(self.base_model),
                sources=layer_sources(self.base_model),
            )

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        name_or_folder: str | Path,
        adapter_name: str = DEFAULT,
        *,
        is_trainable: bool = False,
        check: bool = True,
        fallback: Fallback | None = None,
    ) -> PrefixTuningModel:
        """Loads an adapter that fastprefix or PEFT saved, and with it the one inside the base.

        Args:
            model: the base; patched and frozen.
            name_or_folder: a folder, or a repository name on the Hugging Face hub.
            adapter_name: what to call the prefix.
            is_trainable: whether to train it further (directly; an MLP is gone), and with it
                what is inside the base.
            check: see :func:`fastprefix.patch_model`.
            fallback: for a base that cannot be patched, see :func:`fastprefix.patch_model`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: not a prefix-tuning adapter for this model, or an unknown fallback.
        """
        model = unwrap(model)
        with patched(model, fallback, check=check):  # left as it was if the adapter is refused
            adapter, config = _load(name_or_folder, model)
        config = replace(config, fallback=fallback)
        inside = find_base_adapter(name_or_folder)
        if inside is not None:
            load_base_adapter(model, inside, is_trainable=is_trainable)
        load_heads(model, adapter.heads)
        tuned = cls(model, config, adapter_name=adapter_name, check=check)
        tuned.encoder.start_from_prefix(adapter.kv)
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
                this model, or one that was trained with an adapter inside the base that is not
                this base's.
        """
        adapter, config = _load(name_or_folder, self.base_model)
        if adapter.heads:
            raise ValueError(
                f"{name_or_folder}: holds {sorted(adapter.heads)} besides, which all adapters of "
                "a model share; load it by from_pretrained"
            )
        inside = find_base_adapter(name_or_folder)
        if inside is not None and not is_base_adapter(self.base_model, inside):
            raise ValueError(
                f"{name_or_folder}: holds an adapter inside the base, too, which this base lacks "
                "or has other numbers in; load both by from_pretrained"
            )
        self.add_adapter(adapter_name, config)
        encoder = self.encoders[adapter_name]
        assert isinstance(encoder, Encoder)
        encoder.start_from_prefix(adapter.kv)
        self.set_requires_grad(adapter_name, is_trainable)


def _load(name_or_folder: str | Path, model: PreTrainedModel) -> tuple[Adapter, PrefixConfig]:
    """A saved prefix for a patched model, and a configuration that trains it directly."""
    adapter = load_adapter(
        name_or_folder, layer_shapes(model), layer_groups(model), layer_sources(model)
    )
    activate(model, adapter.kv)  # refuses what the model cannot run
    kind = adapter.config.get("kind", adapter.config["peft_type"])
    has = kind_of(adapter.kv.reweighting)
    lengths = [key.shape[1] for key in adapter.kv.keys]
    config = PrefixConfig(
        num_virtual_tokens=adapter.kv.num_virtual_tokens,
        layer_lengths=None if len(set(lengths)) == 1 else lengths,
        task_type=adapter.config.get("task_type"),
        modules_to_save=saved_heads(adapter.config, adapter.heads),
        num_frozen_tokens=adapter.config.get("num_frozen_tokens", 0),
        position_offset=adapter.kv.position_offset,
        prefix_in_window=adapter.kv.in_window,
        prefix_bias=adapter.config.get("prefix_bias", "learned") if has == "bias" else None,
        gated=has == "gate",
        peft_type=kind if kind in PREFIX_KINDS else "PREFIX_TUNING",
    )
    return adapter, config


def _whole(encoder: nn.Module) -> PrefixKV:
    """What an encoder makes, of all ranks' shares of its parameters."""
    whole = {
        name: parameter.full_tensor()
        for name, parameter in encoder.named_parameters()
        if isinstance(parameter, DTensor)
    }
    return torch.func.functional_call(encoder, whole, ()) if whole else encoder()


def _distinct(names: Sequence[str | None]) -> list[str]:
    """The names in their order, each once."""
    return [name for name in dict.fromkeys(names) if name is not None]


def _batch_size(inputs: dict[str, Any]) -> int | None:
    """Rows of a call's input; None where it cannot be seen."""
    for name in ("inputs", "input_ids", "inputs_embeds"):
        if isinstance(inputs.get(name), Tensor):
            return inputs[name].shape[0]
    return None


def _may_be_packed(inputs: dict[str, Any]) -> bool:
    """Whether one row may hold several sequences."""
    told = any(inputs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx"))
    return _batch_size(inputs) == 1 and (told or inputs.get("position_ids") is not None)


def _has_windows(model: PreTrainedModel) -> bool:
    """Whether any layer of a model sees a part of the text alone."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None
