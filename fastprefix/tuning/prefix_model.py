"""A frozen model with trainable prefixes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.arguments import methods_refuse_unknown_arguments, refuses_unknown_arguments
from fastprefix.encoders import Encoder, evaluating
from fastprefix.hf.checking.check_prefix import check_prefix
from fastprefix.hf.hub import Source
from fastprefix.hf.patch.activation import activate
from fastprefix.hf.patch.patch import is_patched, patch_of
from fastprefix.hf.patch.patching import Fallback, patch_model, patched, unpatch_model, use_prefix
from fastprefix.hf.patch.threads import wanting_none
from fastprefix.hf.peft_base import (
    find_base_adapter,
    load_base_adapter,
    unwrap,
)
from fastprefix.hf.peft_format import PREFIX_KINDS, Adapter, load_adapter, save_adapter
from fastprefix.kv import PrefixKV
from fastprefix.kv.reweighting import kind_of
from fastprefix.tuning import hub
from fastprefix.tuning.checkpoint import (
    Checkpoint,
    as_it_was,
    fresh,
    load_state,
    read_checkpoint,
)
from fastprefix.tuning.configs.accepted import agreed, as_prefix_config
from fastprefix.tuning.configs.prefix_config import PrefixConfig
from fastprefix.tuning.configs.tuning_config import PeftsOwn
from fastprefix.tuning.heads import check_saved, find_heads, saved_heads
from fastprefix.tuning.misspelt import check_tensors, refuse_misspelt, refuse_misspelt_option
from fastprefix.tuning.named_adapters import DEFAULT
from fastprefix.tuning.new_encoders import new_encoder
from fastprefix.tuning.saved_adapters import SavedAdapters
from fastprefix.tuning.tuned_model import with_inputs_of_bases


@methods_refuse_unknown_arguments
class PrefixTuningModel(SavedAdapters):
    """Prefix tuning: the base model is frozen, its attention sees a trained prefix.

    The base model is patched in place and stays so. It may hold several prefixes by name, of which
    all rows of a batch use the active one, or each row its own (``prefix_names``). It may also
    hold a LoRA, or another adapter of PEFT's that sits inside the model: a PeftModel is taken for
    its inside, both train, and both are saved and loaded together.

    ``state_dict()`` holds the encoders and what is trained inside the base, so that a trainer's
    checkpoints do not repeat the base; ``save_pretrained`` writes PEFT's format.

    Args:
        model: the base; frozen, but for what PEFT's adapters inside it train.
        config: a :class:`PrefixConfig`, or PEFT's PrefixTuningConfig or CartridgeConfig; with
            inference_mode nothing is trained.
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

    config_class = PrefixConfig

    def __init__(
        self,
        model: PreTrainedModel,
        config: PrefixConfig | PeftsOwn,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapter_name: str = DEFAULT,
        *,
        check: bool = True,
    ) -> None:
        config = as_prefix_config(config)
        model = unwrap(model)
        with patched(model, config.fallback, check=check):  # left as it was if it is refused
            find_heads(model, config.modules_to_save, config.task_type)
            encoder = new_encoder(model, config, tokenizer)
            check_prefix(model)
            patch_model(model, fallback=config.fallback)
        super().__init__(model, adapter_name, config, encoder)

    def _made(
        self, config: PrefixConfig | PeftsOwn, tokenizer: PreTrainedTokenizerBase | None
    ) -> tuple[PrefixConfig, Encoder]:
        config = as_prefix_config(config)
        return config, new_encoder(self.base_model, config, tokenizer)

    @property
    def encoder(self) -> Encoder:
        """The active adapter's encoder."""
        encoder = self.encoders[self._named(None)]
        assert isinstance(encoder, Encoder)
        return encoder

    @property
    def prefix_configs(self) -> dict[str, PrefixConfig]:
        """The adapters' configurations."""
        return self._configs

    @property
    def prefix_config(self) -> PrefixConfig:
        """The active adapter's configuration."""
        return self._configs[self._named(None)]

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
            TypeError: an unknown argument whose name is like that of a known one, an input that is
                no tensor, or prefix_names that are no names.
            ValueError: prefix_names has an unknown name, or not one for each row.
        """
        refuse_misspelt("forward", kwargs, self._inputs)
        check_tensors(input_ids=input_ids, inputs_embeds=inputs_embeds)
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        kwargs.update({name: value for name, value in given.items() if value is not None})
        rows: Sequence[str | None] = [None]  # of the heads
        if prefix_names is not None:
            # packed sequences are counted where they run
            self._check_rows(prefix_names, None if _may_be_packed(kwargs) else _batch_size(kwargs))
            named = {name: self._prefix(name) for name in _distinct(prefix_names)}
            if named:
                kwargs["fastprefix"] = activate(self.base_model, named, prefix_names)
                rows = prefix_names
        elif not self._adapters_disabled:
            rows = [name := self._named(None)]
            kwargs["fastprefix"] = activate(self.base_model, self._prefix(name))
        alone = "fastprefix" not in kwargs
        with self._use_heads(rows), wanting_none() if alone else contextlib.nullcontext():
            return self.base_model(**kwargs)

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
        refuse_misspelt_option(generate, kwargs, self._inputs)
        rows: Sequence[str | None] = [None]  # of the heads
        prefix: contextlib.AbstractContextManager[Any] = wanting_none()
        if prefix_names is not None:
            self._check_rows(prefix_names, _batch_size({"inputs": args[0]} if args else kwargs))
            named = {name: self.export(name) for name in _distinct(prefix_names)}
            if named:
                prefix = use_prefix(self.base_model, named, prefix_names)
                rows = prefix_names
        elif not self._adapters_disabled:
            rows = [name := self._named(None)]
            prefix = use_prefix(self.base_model, self.export(name))
        with self._use_heads(rows), prefix:
            return generate(*args, **kwargs)

    @torch.no_grad()
    def export(self, adapter_name: str | None = None) -> PrefixKV:
        """A prefix as it stands: no dropout, no parameterisation, no graph; without its heads.

        Args:
            adapter_name: which; the active one if None.

        Raises:
            ValueError: no adapter of this name.
        """
        name = self._named(adapter_name)
        return self._prefix(name, evaluating(self.encoders[name])).detach()

    def _prefix(self, adapter_name: str, encoder: nn.Module | None = None) -> PrefixKV:
        """A prefix with gradients, for all layers: those that have none get length 0.

        Of an encoder that FSDP sharded, outside its forward, the whole: all ranks make this call.

        Args:
            adapter_name: whose.
            encoder: in place of the adapter's own.
        """
        kv: PrefixKV = _whole(self.encoders[adapter_name] if encoder is None else encoder)
        slides = self._configs[adapter_name].prefix_in_window
        return replace(kv, in_window=True) if slides else kv

    def _config_as_it_stands(self, adapter_name: str) -> PrefixConfig:
        """As in the base class; of a prefix that grew, as long as it is."""
        config, encoder = self.prefix_configs[adapter_name], self.encoders[adapter_name]
        assert isinstance(encoder, Encoder)
        lengths = None if config.layer_lengths is None else list(encoder.layout.lengths)
        P = encoder.layout.num_virtual_tokens
        return replace(config, num_virtual_tokens=P, layer_lengths=lengths)

    def _exported(self, adapter_name: str) -> PrefixKV:
        return self.export(adapter_name)

    def _write(
        self,
        folder: Path,
        adapter_name: str,
        exported: PrefixKV,
        heads: dict[str, Tensor],
        safe_serialization: bool,
    ) -> None:
        config = self.prefix_configs[adapter_name]
        if not config.prefix_in_window and _has_windows(self.base_model):
            warnings.warn(
                f"{type(self.base_model).__name__} has sliding windows, out of which PEFT lets "
                "a prefix slide: with texts that are longer its results are not ours. "
                "PrefixConfig(prefix_in_window=True) trains a prefix that slides here too",
                stacklevel=4,
            )
        fields = {
            "base_model_name_or_path": getattr(self.base_model, "name_or_path", None) or None,
            "modules_to_save": self.head_names(adapter_name),
            "num_frozen_tokens": config.num_frozen_tokens,
            "task_type": config.task_type,
        }
        if config.prefix_bias is not None:
            fields["prefix_bias"] = config.prefix_bias
        if config.peft_type == "PREFIX_TUNING":
            fields["encoder_hidden_size"] = config.encoder_hidden_size
            fields["prefix_projection"] = config.prefix_projection
        save_adapter(
            folder,
            exported,
            fields,
            kind=config.peft_type,
            heads=heads,
            groups=patch_of(self.base_model).groups,
            sources=patch_of(self.base_model).sources,
            safe_serialization=safe_serialization,
        )

    def _read(self, place: Source) -> tuple[Adapter, PrefixConfig]:
        return _load(place, self.base_model)

    def _start(self, adapter_name: str, saved: Adapter) -> None:
        encoder = self.encoders[adapter_name]
        assert isinstance(encoder, Encoder)
        encoder.start_from_prefix(saved.kv)
        self._load_heads(adapter_name, saved.heads)

    @classmethod
    @refuses_unknown_arguments
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str | Path,
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: PrefixConfig | PeftsOwn | None = None,
        *,
        torch_device: str | torch.device | None = None,
        low_cpu_mem_usage: bool = False,
        subfolder: str | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | None = None,
        check: bool = True,
        fallback: Fallback | None = None,
    ) -> PrefixTuningModel:
        """Loads an adapter that fastprefix or PEFT saved, and with it the one inside the base.

        A checkpoint that transformers' Trainer wrote of such a model, which holds its parameters,
        is loaded, too, with all its adapters and their networks.

        Args:
            model: the base; patched and frozen.
            model_id: a folder, or a repository name on the Hugging Face hub.
            adapter_name: what to call the prefix.
            is_trainable: whether to train it further (directly; an MLP is gone), and with it
                what is inside the base.
            config: a :class:`PrefixConfig` or PEFT's for such prefixes, which the files must agree
                with; of what they do not tell, dropout is taken from it.
            torch_device: a device, as in PEFT; the prefix is on the base's, whatever it is.
            low_cpu_mem_usage: as in PEFT; a prefix is small, and loaded the same way with either.
            subfolder: of model_id, where the files are.
            revision: of the repository: a branch, tag or commit.
            token: the hub's.
            cache_dir: where downloads go.
            check: see :func:`fastprefix.patch_model`.
            fallback: for a base that cannot be patched, see :func:`fastprefix.patch_model`.

        Raises:
            FileNotFoundError: a file is missing.
            TypeError: config is none of a prefix.
            ValueError: not a prefix-tuning adapter for this model, one that config does not agree
                with, or an unknown fallback.
        """
        hub.check_loading(torch_device, low_cpu_mem_usage)
        place = Source(str(model_id), subfolder, revision, token, cache_dir)
        wanted = None if config is None else as_prefix_config(config)
        model = unwrap(model)
        if (saved := read_checkpoint(place, cls.config_class.model_class)) is not None:
            return cls._of_checkpoint(
                model, saved, adapter_name, is_trainable, wanted, place, check, fallback
            )
        with patched(model, fallback, check=check):  # left as it was if the adapter is refused
            adapter, found = _load(place, model)
        if wanted is not None:
            found = agreed(wanted, found, place)
        found = replace(found, fallback=fallback, inference_mode=not is_trainable)
        inside = find_base_adapter(place)
        if inside is not None:
            load_base_adapter(model, inside, is_trainable=is_trainable)
        tuned = cls(model, found, adapter_name=adapter_name, check=check)
        tuned._start(adapter_name, adapter)
        if not is_trainable:
            tuned.requires_grad_(False)
        return tuned.train(is_trainable)

    @classmethod
    def _of_checkpoint(
        cls,
        model: PreTrainedModel,
        saved: Checkpoint,
        adapter_name: str,
        is_trainable: bool,
        wanted: PrefixConfig | None,
        place: Source,
        check: bool,
        fallback: Fallback | None,
    ) -> PrefixTuningModel:
        """All adapters, by the names that they had; one alone by the name that is given."""
        saved = saved.called(adapter_name)
        settings = {name: {**one, "fallback": fallback} for name, one in saved.adapters.items()}
        configs = {name: saved.config(PrefixConfig, one) for name, one in settings.items()}
        if wanted is not None:
            agreed(wanted, configs[saved.active or next(iter(configs))], place)
        first, *others = settings
        was_patched = is_patched(model)
        with as_it_was(model, lambda base: None if was_patched else unpatch_model(base)):
            start = PrefixConfig(**fresh(settings[first]))
            tuned = cls(model, start, adapter_name=first, check=check)
            for name in others:
                tuned.add_adapter(name, PrefixConfig(**fresh(settings[name])))
            load_state(tuned, saved)
        tuned._as_trained(configs, saved.active, is_trainable)
        return tuned


def _load(place: Source, model: PreTrainedModel) -> tuple[Adapter, PrefixConfig]:
    """A saved prefix for a patched model, and a configuration that trains it directly."""
    patch = patch_of(model)
    adapter = load_adapter(place, patch.shapes, patch.groups, patch.sources)
    activate(model, adapter.kv)  # refuses what the model cannot run
    kind = adapter.config.get("kind", adapter.config["peft_type"])
    heads = saved_heads(adapter.config, adapter.heads)
    check_saved(model, adapter.heads, heads, adapter.config.get("task_type"))
    has = kind_of(adapter.kv.reweighting)
    lengths = [key.shape[1] for key in adapter.kv.keys]
    config = PrefixConfig(
        num_virtual_tokens=adapter.kv.num_virtual_tokens,
        layer_lengths=None if len(set(lengths)) == 1 else lengths,
        task_type=adapter.config.get("task_type"),
        modules_to_save=heads,
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
