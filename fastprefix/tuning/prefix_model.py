"""A frozen model with trainable prefixes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.arguments import methods_refuse_unknown_arguments
from fastprefix.encoders import Encoder, evaluating
from fastprefix.formats.peft_prefixes import PREFIX_KINDS, Adapter, load_adapter, save_adapter
from fastprefix.formats.source import Source
from fastprefix.hf.checking.check_prefix import check_prefix
from fastprefix.hf.patch.activation import activate
from fastprefix.hf.patch.patch import is_patched, patch_of
from fastprefix.hf.patch.patching import Fallback, patch_model, patched, unpatch_model, use_prefix
from fastprefix.hf.patch.threads import wanting_none
from fastprefix.kv import PrefixKV
from fastprefix.kv.reweighting import kind_of
from fastprefix.tuning.adapter_names import DEFAULT
from fastprefix.tuning.configs.accepted import as_prefix_config
from fastprefix.tuning.configs.prefix_config import PrefixConfig
from fastprefix.tuning.configs.tuning_config import PeftConfigLike, TuningConfig
from fastprefix.tuning.find_heads import check_saved_heads, find_heads, saved_head_names
from fastprefix.tuning.misspelt import check_tensors, refuse_misspelt, refuse_misspelt_option
from fastprefix.tuning.new_encoders import new_prefix_encoder
from fastprefix.tuning.peft_base import unwrap
from fastprefix.tuning.saved_adapters import SavedAdapters
from fastprefix.tuning.saving_arguments import check_loading
from fastprefix.tuning.trainer_contract import with_inputs_of_bases

if TYPE_CHECKING:
    from typing_extensions import Self


@methods_refuse_unknown_arguments
class PrefixTuningModel(SavedAdapters):
    """Prefix tuning: the base model is frozen, and its attention sees a trained prefix.

    The base model is patched in place, and stays patched. The model may hold several prefixes by
    name. All rows of a batch use the active one, or each row its own (``prefix_names``).

    The base may hold a LoRA, or another of PEFT's adapters that sit inside a model. If model is a
    PeftModel, the model inside it becomes the base. Both the prefix and the inner adapter are then
    trained, and they are saved and loaded together.

    ``state_dict()`` holds the encoders and what is trained inside the base, so that a trainer's
    checkpoints do not repeat the base. ``save_pretrained`` writes PEFT's format.

    Args:
        model: the base. Its parameters are frozen, except those of PEFT's adapters inside it.
        config: a :class:`PrefixConfig`, or PEFT's PrefixTuningConfig or CartridgeConfig. With
            inference_mode nothing is trained.
        tokenizer: the base's; needed for init="text".
        adapter_name: the name of the first prefix.
        check: see :func:`fastprefix.patch_model`.

    Raises:
        ValueError: the config does not fit the model; init="text" needs a tokenizer; or model is a
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
        config: PrefixConfig | PeftConfigLike,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapter_name: str = DEFAULT,
        *,
        check: bool = True,
    ) -> None:
        config = as_prefix_config(config)
        model = unwrap(model)
        with patched(model, config.fallback, check=check):  # undone if the config is refused
            find_heads(model, config.modules_to_save, config.task_type)
            encoder = new_prefix_encoder(model, config, tokenizer)
            check_prefix(model)
            patch_model(model, fallback=config.fallback)
        super().__init__(model, adapter_name, config, encoder)

    def _new_adapter(
        self, config: PrefixConfig | PeftConfigLike, tokenizer: PreTrainedTokenizerBase | None
    ) -> tuple[PrefixConfig, Encoder]:
        config = as_prefix_config(config)
        return config, new_prefix_encoder(self.base_model, config, tokenizer)

    @property
    def encoder(self) -> Encoder:
        """The active adapter's encoder."""
        return self._encoder(self._known_name(None))

    @property
    def prefix_configs(self) -> dict[str, PrefixConfig]:
        """The adapters' configurations."""
        return self._configs

    @property
    def prefix_config(self) -> PrefixConfig:
        """The active adapter's configuration."""
        return self._configs[self._known_name(None)]

    @property
    def loss_type(self) -> str | None:
        """The base's loss type. It tells the Trainer which labels the loss averages over."""
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
        """Runs the base model with the prefix. Masks, positions and labels are those of the text.

        Args:
            input_ids: [B, L].
            attention_mask: [B, L], 0 for padding on either side.
            position_ids: [B, L], counted from 0 at the text's first token.
            inputs_embeds: [B, L, hidden], in place of input_ids.
            labels: [B, L], -100 where no loss is wanted.
            prefix_names: B names of adapters, one for each row (for each sequence, if several are
                packed in a row); None in the list is a row without a prefix. If prefix_names is
                None, all rows have the active adapter.
            kwargs: other arguments of the base model's forward.

        Raises:
            TypeError: an unknown argument looks like a misspelt one, an input is no tensor, or
                prefix_names are no names.
            ValueError: prefix_names has an unknown name, or another number of names than rows.
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
        rows: Sequence[str | None] = [None]  # whose heads are used
        if prefix_names is not None:
            # packed sequences are counted later, where they run
            self._check_rows(prefix_names, None if _may_be_packed(kwargs) else _batch_size(kwargs))
            named = {name: self._prefix(name) for name in _distinct(prefix_names)}
            if named:
                kwargs["fastprefix"] = activate(self.base_model, named, prefix_names)
                rows = prefix_names
        elif not self._adapters_disabled:
            rows = [name := self._known_name(None)]
            kwargs["fastprefix"] = activate(self.base_model, self._prefix(name))
        without = "fastprefix" not in kwargs
        with self._use_heads(rows), wanting_none() if without else contextlib.nullcontext():
            return self.base_model(**kwargs)

    @torch.no_grad()
    def generate(
        self, *args: Any, prefix_names: Sequence[str | None] | None = None, **kwargs: Any
    ) -> Any:
        """Runs the base model's ``generate()`` with the prefix.

        It uses a cache unless use_cache is given, because the Trainer sets use_cache to False in
        the base's config.

        Args:
            args: positional arguments of the base model's method.
            prefix_names: see :meth:`forward`. There is one name for each row of the input, also if
                generate() makes several beams or sequences of a row.
            kwargs: arguments of the base model's method.

        Raises:
            ValueError: see :meth:`forward`.
        """
        kwargs.setdefault("use_cache", True)
        generate: Any = self.base_model.generate  # models for other tasks have none
        refuse_misspelt_option(generate, kwargs, self._inputs)
        rows: Sequence[str | None] = [None]  # whose heads are used
        prefix: contextlib.AbstractContextManager[Any] = wanting_none()
        if prefix_names is not None:
            self._check_rows(prefix_names, _batch_size({"inputs": args[0]} if args else kwargs))
            named = {name: self.export(name) for name in _distinct(prefix_names)}
            if named:
                prefix = use_prefix(self.base_model, named, prefix_names)
                rows = prefix_names
        elif not self._adapters_disabled:
            rows = [name := self._known_name(None)]
            prefix = use_prefix(self.base_model, self.export(name))
        with self._use_heads(rows), prefix:
            return generate(*args, **kwargs)

    @torch.no_grad()
    def export(self, adapter_name: str | None = None) -> PrefixKV:
        """Returns a prefix's present keys and values, without dropout, network, graph and heads.

        Args:
            adapter_name: the adapter; the active one if None.

        Raises:
            ValueError: there is no adapter of this name.
        """
        name = self._known_name(adapter_name)
        return self._prefix(name, evaluating(self.encoders[name])).detach()

    def _encoder(self, adapter_name: str) -> Encoder:
        encoder = self.encoders[adapter_name]
        assert isinstance(encoder, Encoder)
        return encoder

    def _prefix(self, adapter_name: str, encoder: nn.Module | None = None) -> PrefixKV:
        """Computes a prefix with gradients, for all layers. Layers without one get length 0.

        If FSDP sharded the encoder, its parameters are gathered, so all ranks must make this call.

        Args:
            adapter_name: the adapter.
            encoder: the encoder to use in place of the adapter's own.
        """
        kv: PrefixKV = _call_gathered(self.encoders[adapter_name] if encoder is None else encoder)
        slides = self._configs[adapter_name].prefix_in_window
        return replace(kv, in_window=True) if slides else kv

    def _present_config(self, adapter_name: str) -> PrefixConfig:
        """See the base class. A prefix may have grown in training."""
        config, encoder = self.prefix_configs[adapter_name], self._encoder(adapter_name)
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
        fields = self._shared_fields(adapter_name)
        fields["num_frozen_tokens"] = config.num_frozen_tokens
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

    @classmethod
    def _read_adapter(cls, place: Source, model: PreTrainedModel) -> tuple[Adapter, PrefixConfig]:
        adapter = load_adapter(
            place, patch_of(model).shapes, patch_of(model).groups, patch_of(model).sources
        )
        activate(model, adapter.kv)  # refuses what the model cannot run
        kind = adapter.config.get("kind", adapter.config["peft_type"])
        heads = saved_head_names(adapter.config, adapter.heads)
        check_saved_heads(model, adapter.heads, heads, adapter.config.get("task_type"))
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

    def _start_from(self, adapter_name: str, saved: Adapter) -> None:
        self._encoder(adapter_name).start_from_prefix(saved.kv)
        self._load_heads(adapter_name, saved.heads)

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str | Path,
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: TuningConfig | PeftConfigLike | None = None,
        *,
        torch_device: str | torch.device | None = None,
        low_cpu_mem_usage: bool = False,
        subfolder: str | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | None = None,
        check: bool = True,
        fallback: Fallback | None = None,
    ) -> Self:
        """Loads an adapter that fastprefix or PEFT saved.

        An adapter inside the base that was saved with it is loaded too. So is a checkpoint that
        transformers' Trainer wrote of such a model, with all its adapters and their networks.

        Args:
            model: the base; it is patched and frozen.
            model_id: a folder, or a repository name on the Hugging Face hub.
            adapter_name: the name that the prefix gets.
            is_trainable: whether to train it further, and with it what is inside the base. A saved
                prefix is then trained directly, because its network was not saved.
            config: a :class:`PrefixConfig`, or PEFT's for such prefixes, with which the files must
                agree. Its dropout is used, which no file holds.
            torch_device: a device, as in PEFT. It has no effect: prefixes are on the base's device.
            low_cpu_mem_usage: as in PEFT. It has no effect: prefixes are small.
            subfolder: the sub-folder of model_id that holds the files.
            revision: a branch, tag or commit of the repository.
            token: the hub's access token.
            cache_dir: where downloads go.
            check: see :func:`fastprefix.patch_model`.
            fallback: for a base that cannot be patched, see :func:`fastprefix.patch_model`.

        Raises:
            FileNotFoundError: a file is missing.
            TypeError: config is no configuration of a prefix.
            ValueError: the files hold no prefix for this model, config does not agree with them, or
                fallback is unknown.
        """
        check_loading(torch_device, low_cpu_mem_usage)
        place = Source(str(model_id), subfolder, revision, token, cache_dir)
        fields, options = {"fallback": fallback}, {"check": check}
        return cls._load(model, place, adapter_name, is_trainable, config, fields, options)

    @classmethod
    def _as_config(cls, config: Any) -> PrefixConfig:
        return as_prefix_config(config)

    @classmethod
    def _base_as_tuned(
        cls, model: PreTrainedModel, settings: Mapping[str, Any]
    ) -> contextlib.AbstractContextManager[Any]:
        return patched(model, settings["fallback"], check=settings["check"])

    @classmethod
    def _undoing(cls, model: PreTrainedModel) -> Callable[[PreTrainedModel], object]:
        return super()._undoing(model) if is_patched(model) else unpatch_model


def _call_gathered(encoder: nn.Module) -> PrefixKV:
    """Calls an encoder with its whole parameters, gathered from all ranks if FSDP sharded them."""
    gathered = {
        name: parameter.full_tensor()
        for name, parameter in encoder.named_parameters()
        if isinstance(parameter, DTensor)
    }
    return torch.func.functional_call(encoder, gathered, ()) if gathered else encoder()


def _distinct(names: Sequence[str | None]) -> list[str]:
    """The names in their order, each once."""
    return [name for name in dict.fromkeys(names) if name is not None]


def _batch_size(inputs: dict[str, Any]) -> int | None:
    """The number of rows of a call's input; None if no input is known."""
    for name in ("inputs", "input_ids", "inputs_embeds"):
        if isinstance(inputs.get(name), Tensor):
            return inputs[name].shape[0]
    return None


def _may_be_packed(inputs: dict[str, Any]) -> bool:
    """Whether one row may hold several sequences."""
    packed = any(inputs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx"))
    return _batch_size(inputs) == 1 and (packed or inputs.get("position_ids") is not None)


def _has_windows(model: PreTrainedModel) -> bool:
    """Whether any layer of a model does not see the whole text."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None
