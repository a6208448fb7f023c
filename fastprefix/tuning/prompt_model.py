"""A frozen model with a trainable prompt among its input embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.arguments import (
    check_type,
    methods_refuse_unknown_arguments,
    refuses_unknown_arguments,
    shown,
)
from fastprefix.encoders import evaluating
from fastprefix.hf.devices import device_of
from fastprefix.hf.hub import Source
from fastprefix.hf.patch.patching import UnsupportedModelError, use_prefix
from fastprefix.hf.patch.threads import wanting_none
from fastprefix.hf.peft_base import (
    find_base_adapter,
    load_base_adapter,
    unwrap,
)
from fastprefix.hf.peft_prompts import INFIX_KIND, Prompt, load_prompt, save_prompt
from fastprefix.hf.prefill.prompts import prefill_embeddings
from fastprefix.hf.versions import cache_of, length_of
from fastprefix.kv import PrefixKV
from fastprefix.tuning import hub
from fastprefix.tuning.checkpoint import (
    Checkpoint,
    as_it_was,
    fresh,
    load_state,
    read_checkpoint,
)
from fastprefix.tuning.configs.accepted import agreed, as_prompt_config, tokenizer_of
from fastprefix.tuning.configs.prompt_config import PromptConfig
from fastprefix.tuning.configs.tuning_config import PeftsOwn
from fastprefix.tuning.heads import check_saved, find_heads, saved_heads
from fastprefix.tuning.misspelt import check_tensors, refuse_misspelt, refuse_misspelt_option
from fastprefix.tuning.named_adapters import DEFAULT
from fastprefix.tuning.prompt_encoder import PromptEncoder
from fastprefix.tuning.prompt_layout import Layout, Padding, lay_out, positions
from fastprefix.tuning.saved_adapters import SavedAdapters
from fastprefix.tuning.tuned_model import embedding_weight, initial_ids, with_inputs_of_bases

# outputs with one entry per token, and of how many dimensions they are then
_PER_TOKEN = {"logits": 3, "last_hidden_state": 3, "start_logits": 2, "end_logits": 2}


@methods_refuse_unknown_arguments
class PromptTuningModel(SavedAdapters):
    """Prompt tuning, P-tuning, infix tuning: the base is frozen, its input has a trained part.

    The forward feeds the base the embeddings of prompt and text in one sequence, so that any
    model that takes ``inputs_embeds`` can be trained; nothing is patched. In front of the text of
    a causal model the prompt has keys and values of its own: :meth:`export` computes them, and
    :meth:`generate` keeps that one copy for the whole batch.

    It may hold several prompts by name, of which all rows of a batch have the active one.

    Padding on either side changes nothing for a row: its prompt lies next to its text, and padding
    takes no positions. An encoder's rows are fed with their padding behind, the rows of a causal
    classifier, which reads the last token, with their padding in front.

    Args:
        model: the base; all its parameters are frozen.
        config: a :class:`PromptConfig`, or PEFT's PromptTuningConfig or PromptEncoderConfig; with
            inference_mode nothing is trained.
        tokenizer: the base's; needed for init="text".
        adapter_name: of the first prompt.

    Raises:
        ValueError: init="text" without a tokenizer, or the base takes no inputs_embeds.

    Example:
        >>> tuned = PromptTuningModel(model, PromptConfig(num_virtual_tokens=32))
        >>> Trainer(tuned, arguments, train_dataset=data).train()
        >>> tuned.save_pretrained("adapter")
    """

    config_class = PromptConfig

    def __init__(
        self,
        model: PreTrainedModel,
        config: PromptConfig | PeftsOwn,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapter_name: str = DEFAULT,
    ) -> None:
        tokenizer = tokenizer_of(config) if tokenizer is None else tokenizer
        config = as_prompt_config(config)
        model = unwrap(model)
        check_type("model", model, PreTrainedModel, "a transformers PreTrainedModel")
        taken = inspect.signature(model.forward).parameters
        if "inputs_embeds" not in taken:
            raise ValueError(
                f"model: got {type(model).__name__}, takes one whose forward has inputs_embeds"
            )
        find_heads(model, config.modules_to_save, config.task_type)  # before anything is changed
        encoder = _new_encoder(model, config, tokenizer)
        super().__init__(model, adapter_name, config, encoder)
        self._takes_positions = "position_ids" in taken
        self._has_causal_layers = any(getattr(x, "is_causal", False) for x in model.modules())

    def _made(
        self, config: PromptConfig | PeftsOwn, tokenizer: PreTrainedTokenizerBase | None
    ) -> tuple[PromptConfig, PromptEncoder]:
        tokenizer = tokenizer_of(config) if tokenizer is None else tokenizer
        config = as_prompt_config(config)
        return config, _new_encoder(self.base_model, config, tokenizer)

    @property
    def encoder(self) -> PromptEncoder:
        """The active prompt's encoder."""
        return self._encoder(self._named(None))

    @property
    def prompt_configs(self) -> dict[str, PromptConfig]:
        """The prompts' configurations."""
        return self._configs

    @property
    def prompt_config(self) -> PromptConfig:
        """The active prompt's configuration."""
        return self.prompt_configs[self._named(None)]

    @property
    def loss_type(self) -> None:
        """None: the loss counts all labels, for the prompt predicts the first token, too."""
        return None

    @with_inputs_of_bases
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        infix_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward with the prompt; masks, positions and labels are the text's.

        So are the outputs of each token (logits, start_logits, end_logits, last_hidden_state);
        what they are for padding means nothing. hidden_states and past_key_values have the prompt.
        Under :meth:`disable_adapter` it is the base model's forward, and nothing else.

        Args:
            input_ids: [B, L].
            attention_mask: [B, L], 0 for padding on either side.
            position_ids: [B, L], counted from 0 at the text's first token.
            inputs_embeds: [B, L, hidden], in place of input_ids.
            labels: [B, L], -100 where no loss is wanted; or what the base's task takes.
            infix_positions: [B], how many of a row's real tokens come before an infix.
            kwargs: whatever else the base model's forward takes.

        Raises:
            TypeError: an unknown argument whose name is like that of a known one, or an input that
                is no tensor.
            ValueError: infix_positions are missing, out of range, or given for a prompt in front;
                the mask is not one of padding; a cache holds tokens already; the sequences are
                packed; prefix_names are given; no prompt is active.
        """
        _refuse_names(kwargs)
        refuse_misspelt("forward", kwargs, self._inputs)
        check_tensors(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds
        )
        if self._adapters_disabled:
            given = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "inputs_embeds": inputs_embeds,
                "labels": labels,
            }
            kwargs.update({name: value for name, value in given.items() if value is not None})
            with self._use_heads([None]), wanting_none():
                return self.base_model(**kwargs)
        name = self._named(None)
        with self._use_heads([name]):
            return self._forward(
                name,
                input_ids,
                attention_mask,
                position_ids,
                inputs_embeds,
                labels,
                infix_positions,
                kwargs,
            )

    def _forward(
        self,
        name: str,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        labels: Tensor | None,
        infix_positions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Any:
        config = self.prompt_configs[name]
        self._check(attention_mask, position_ids, kwargs)
        embeds = self._embeddings(input_ids, inputs_embeds)
        B, L = embeds.shape[:2]
        after = _after(config, infix_positions, attention_mask, B, L)
        layout = self._layout(config, attention_mask, L, after)
        fed = self._fed(name, layout, embeds, attention_mask, position_ids, after)
        if kwargs.get("token_type_ids") is not None:
            fed["token_type_ids"] = layout.join(0, kwargs.pop("token_type_ids"))
        if labels is not None:
            per_token = labels.shape == (B, L) and config.task_type != "SEQ_CLS"
            moves = per_token and not self._is_encoder_decoder
            fed["labels"] = layout.join(-100, labels) if moves else labels
        for name in ("start_positions", "end_positions"):
            if kwargs.get(name) is not None:
                fed[name] = _moved(kwargs.pop(name), layout)
        as_tuple = kwargs.get("return_dict") is False
        with wanting_none():  # other threads may have a prefix for their calls
            output = self.base_model(**{**kwargs, **fed, "return_dict": True})
        if not self._is_encoder_decoder:
            whole = layout.length + layout.prompt_length
            for name, dims in _PER_TOKEN.items():
                value = output.get(name)
                if value is not None and value.dim() == dims and value.shape[1] == whole:
                    output[name] = layout.text(value)
        return output.to_tuple() if as_tuple else output

    @torch.no_grad()
    def generate(self, *args: Any, infix_positions: Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's ``generate()`` with the prompt.

        A prompt in front of a causal model's text is one copy of keys and values, which the batch
        shares; elsewhere, or where the base cannot be patched, every row is fed it. What comes back
        and what max_length counts is the text, as if there were no prompt; of inputs_embeds alone
        the new tokens.

        Args:
            args: of the base's method, in its order: token ids [B, L] first.
            infix_positions: as in :meth:`forward`; behind the text if None.
            kwargs: of the base's method: input_ids [B, L], or inputs_embeds [B, L, hidden], and
                attention_mask [B, L], 0 for padding, among them.

        Raises:
            TypeError: more positional arguments than the base's method takes.
            ValueError: see :meth:`forward`.
        """
        _refuse_names(kwargs)
        generate: Any = self.base_model.generate  # models for other tasks have none
        refuse_misspelt_option(generate, kwargs, self._inputs)
        given = _by_name(generate, args, kwargs)
        if given.get("use_cache") is None:
            given["use_cache"] = True  # the Trainer switches it off
        if self._adapters_disabled:
            with self._use_heads([None]), wanting_none():
                return generate(**given)
        name = self._named(None)
        with self._use_heads([name]):
            return self._generate(name, generate, infix_positions, given)

    def _generate(
        self,
        name: str,
        generate: Callable[..., Any],
        infix_positions: Tensor | None,
        given: dict[str, Any],
    ) -> Any:
        config = self.prompt_configs[name]
        text = {
            x: given.pop(x)
            for x in ("input_ids", "inputs_embeds", "attention_mask")
            if given.get(x) is not None
        }
        ids, embeds, mask = map(text.get, ("input_ids", "inputs_embeds", "attention_mask"))
        first = ids if embeds is None else embeds
        if first is None:
            raise ValueError("input_ids: got None, takes [B, L], or inputs_embeds [B, L, hidden]")
        B, L = first.shape[:2]
        if self._is_causal(config) and config.placement == "prefix":
            try:
                kv = self.export(name)
            except (UnsupportedModelError, NotImplementedError):
                pass  # such a model takes the embeddings themselves
            else:
                _after(config, infix_positions, mask, B, L)
                with use_prefix(self.base_model, kv):
                    return generate(**text, **given)
        self._check(mask, given.get("position_ids"), given)
        if embeds is None or self._is_encoder_decoder:  # which takes one of the two
            embeds = self._embeddings(ids, embeds)
        if infix_positions is None and config.placement == "infix":
            whole = torch.ones(B, L, device=first.device) if mask is None else mask
            infix_positions = whole.bool().sum(1)
        after = _after(config, infix_positions, mask, B, L)
        layout = self._layout(config, mask, L, after)
        fed = self._fed(name, layout, embeds, mask, None, after)
        fed.pop("position_ids", None)  # generate() makes them of the mask
        # without one generate() would make one for the text alone
        ones = torch.ones(fed["inputs_embeds"].shape[:2], dtype=torch.long, device=embeds.device)
        fed.setdefault("attention_mask", ones)
        if self._is_encoder_decoder:
            with wanting_none():
                return generate(**fed, **given)
        for of_all, of_new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            settings = given.get("generation_config")
            length = getattr(settings, of_all, None)
            if length and not getattr(settings, of_new, None):
                raise ValueError(
                    f"generation_config.{of_all}: got {length}, takes None and {of_new} in its "
                    "place with a prompt"
                )
            if given.get(of_all) is not None:  # transformers would count the prompt
                length = given.pop(of_all) - L
                given.setdefault(of_new, length)
        if ids is not None:
            fed["input_ids"] = ids
        with wanting_none():
            return generate(**fed, **given)

    @torch.no_grad()
    def export_embeddings(self, adapter_name: str | None = None) -> Tensor:
        """A prompt as it stands, [P, width]: no dropout, no network, no graph.

        Args:
            adapter_name: which; the active one if None.

        Raises:
            ValueError: no adapter of this name.
        """
        return evaluating(self._encoder(self._named(adapter_name)))().detach().clone()

    def export(self, adapter_name: str | None = None) -> PrefixKV:
        """A prompt's keys and values, as the base computes them: what a batch can share.

        With its heads: those inside the base's layers have a part in them, others do not.

        Args:
            adapter_name: which; the active one if None.

        Raises:
            ValueError: no adapter of this name; an infix, or the base is not causal: then they
                depend on the text.
            UnsupportedModelError: see :func:`fastprefix.patch_model`.
        """
        name = self._named(adapter_name)
        config = self.prompt_configs[name]
        if config.placement != "prefix" or not self._is_causal(config):
            raise ValueError(
                f"export: the keys and values of this prompt (placement="
                f"{config.placement!r}, {type(self.base_model).__name__}) depend on "
                "the text; takes a prompt in front of a causal model's text. "
                "export_embeddings() gives the prompt itself"
            )
        with self._use_heads([name]):
            return prefill_embeddings(self.base_model, self.export_embeddings(name))

    def _exported(self, adapter_name: str) -> Tensor:
        return self.export_embeddings(adapter_name)

    def _write(
        self,
        folder: Path,
        adapter_name: str,
        exported: Tensor,
        heads: dict[str, Tensor],
        safe_serialization: bool,
    ) -> None:
        config = self.prompt_configs[adapter_name]
        base = self.base_model.config.get_text_config()
        fields: dict[str, Any] = {
            "base_model_name_or_path": getattr(self.base_model, "name_or_path", None) or None,
            "modules_to_save": self.head_names(adapter_name),
            "num_attention_heads": getattr(base, "num_attention_heads", None),
            "num_layers": getattr(base, "num_hidden_layers", None),
            "task_type": config.task_type,
        }
        if config.peft_type == "P_TUNING":
            fields["encoder_reparameterization_type"] = config.encoder_reparameterization_type
            fields["encoder_hidden_size"] = config.encoder_hidden_size or exported.shape[1]
            fields["encoder_num_layers"] = config.encoder_num_layers
            fields["encoder_dropout"] = config.encoder_dropout
        save_prompt(
            folder,
            exported,
            fields,
            kind=config.peft_type,
            heads=heads,
            safe_serialization=safe_serialization,
        )

    def _read(self, place: Source) -> tuple[Prompt, PromptConfig]:
        return _load(place, self.base_model)

    @classmethod
    @refuses_unknown_arguments
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str | Path,
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: PromptConfig | PeftsOwn | None = None,
        *,
        torch_device: str | torch.device | None = None,
        low_cpu_mem_usage: bool = False,
        subfolder: str | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | None = None,
    ) -> PromptTuningModel:
        """Loads a PROMPT_TUNING or P_TUNING adapter that fastprefix or PEFT saved.

        With it comes the adapter inside the base that was saved beside it. A checkpoint that
        transformers' Trainer wrote of such a model, which holds its parameters, is loaded, too,
        with all its prompts and their networks.

        Args:
            model: the base; frozen.
            model_id: a folder, or a repository name on the Hugging Face hub.
            adapter_name: what to call the prompt.
            is_trainable: whether to train it further (directly; a network is gone), and with it
                what is inside the base.
            config: a :class:`PromptConfig` or PEFT's for such prompts, which the files must agree
                with.
            torch_device: a device, as in PEFT; the prompt is on the base's, whatever it is.
            low_cpu_mem_usage: as in PEFT; a prompt is small, and loaded the same way with either.
            subfolder: of model_id, where the files are.
            revision: of the repository: a branch, tag or commit.
            token: the hub's.
            cache_dir: where downloads go.

        Raises:
            FileNotFoundError: a file is missing.
            TypeError: config is none of a prompt.
            ValueError: not an input-level prompt for this model, or config does not agree with it.
        """
        hub.check_loading(torch_device, low_cpu_mem_usage)
        place = Source(str(model_id), subfolder, revision, token, cache_dir)
        wanted = None if config is None else as_prompt_config(config)
        model = unwrap(model)
        if (saved := read_checkpoint(place, cls.config_class.model_class)) is not None:
            return cls._of_checkpoint(model, saved, adapter_name, is_trainable, wanted, place)
        prompt, found = _load(place, model)
        found = replace(found, inference_mode=not is_trainable)
        if wanted is not None:
            found = agreed(wanted, found, place)
        inside = find_base_adapter(place)
        if inside is not None:
            load_base_adapter(model, inside, is_trainable=is_trainable)
        tuned = cls(model, found, adapter_name=adapter_name)
        tuned._start(adapter_name, prompt)
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
        wanted: PromptConfig | None,
        place: Source,
    ) -> PromptTuningModel:
        """All prompts, by the names that they had; one alone by the name that is given."""
        saved = saved.called(adapter_name)
        configs = {n: saved.config(PromptConfig, one) for n, one in saved.adapters.items()}
        first, *others = configs
        if wanted is not None:
            agreed(wanted, configs[saved.active or first], place)
        with as_it_was(model, lambda _: None):
            start = PromptConfig(**fresh(saved.adapters[first]))
            tuned = cls(model, start, adapter_name=first)
            for name in others:
                tuned.add_adapter(name, PromptConfig(**fresh(saved.adapters[name])))
            load_state(tuned, saved)
        tuned._as_trained(configs, saved.active, is_trainable)
        return tuned

    def _start(self, adapter_name: str, saved: Prompt) -> None:
        self._encoder(adapter_name).start_from(saved.embeddings)
        self._load_heads(adapter_name, saved.heads)

    def _encoder(self, adapter_name: str) -> PromptEncoder:
        encoder = self.encoders[adapter_name]
        assert isinstance(encoder, PromptEncoder)
        return encoder

    def _embeddings(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"input_ids, inputs_embeds: got {got}, takes one of them")
        if inputs_embeds is not None:
            return inputs_embeds
        return self.base_model.get_input_embeddings()(input_ids)

    def _check(
        self, mask: Tensor | None, position_ids: Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        """Refuses what the prompt would silently be wrong with."""
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"attention_mask: got {mask.dim()} dimensions, takes [B, L] with a prompt"
            )
        if length_of(cache_of(kwargs)) and not self._is_encoder_decoder:
            raise ValueError(
                "past_key_values: got a cache that holds tokens, takes an empty one: the prompt "
                "would come again behind them; use generate(), or export() and use_prefix"
            )
        packed = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx"))
        if position_ids is not None and mask is None and not torch.compiler.is_compiling():
            packed = packed or bool((position_ids.diff(dim=-1) < 0).any())
        if packed:
            raise ValueError(
                "cu_seq_lens_q, position_ids: got packed sequences, each of which would need the "
                "prompt; takes a padded batch"
            )

    @property
    def _is_encoder_decoder(self) -> bool:
        return bool(self.base_model.config.is_encoder_decoder)

    def _is_causal(self, config: PromptConfig) -> bool:
        """Whether what a prompt in front of a text is made of does not depend on the text."""
        told = config.task_type == "CAUSAL_LM" or self._has_causal_layers
        return told and not self._is_encoder_decoder

    def _layout(
        self, config: PromptConfig, mask: Tensor | None, length: int, after: Tensor | None
    ) -> Layout:
        padding: Padding = None
        if not self._is_causal(config):
            padding = "last"
        elif config.task_type == "SEQ_CLS":
            padding = "first"
        return lay_out(mask, length, config.num_virtual_tokens, after, padding)

    def _fed(
        self,
        name: str,
        layout: Layout,
        embeds: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        after: Tensor | None,
    ) -> dict[str, Any]:
        """Embeddings, mask and positions of prompt and text."""
        causal = self._is_causal(self.prompt_configs[name])
        prompt = self._encoder(name)().to(embeds.device, embeds.dtype)
        fed: dict[str, Any] = {
            "inputs_embeds": layout.join(prompt[None].expand(len(embeds), -1, -1), embeds)
        }
        if mask is not None:
            fed["attention_mask"] = layout.join(1, mask)
        if self._takes_positions and position_ids is not None:
            rows = position_ids.expand(len(embeds), -1)
            fed["position_ids"] = positions(layout, rows, mask, after)
        elif self._takes_positions and mask is not None and causal:
            fed["position_ids"] = (fed["attention_mask"].long().cumsum(1) - 1).clamp(min=0)
        return fed


def _new_encoder(
    model: PreTrainedModel, config: PromptConfig, tokenizer: PreTrainedTokenizerBase | None
) -> PromptEncoder:
    """A prompt's encoder at its start, on the model's device."""
    start = initial_ids(config, model, tokenizer)
    encoder = PromptEncoder(config, embedding_weight(model).shape[1]).to(device_of(model))
    if start is not None:
        with torch.no_grad():  # by the module, which may scale what it looks up
            encoder.start_from(model.get_input_embeddings()(start.to(device_of(model))))
    return encoder


def _load(place: Source, model: PreTrainedModel) -> tuple[Prompt, PromptConfig]:
    """A saved prompt for a model, and a configuration that trains it directly."""
    prompt = load_prompt(place, embedding_weight(model).shape[1])
    task_type = prompt.config.get("task_type")
    heads = saved_heads(prompt.config, prompt.heads)
    check_saved(model, prompt.heads, heads, task_type)
    config = PromptConfig(
        num_virtual_tokens=prompt.embeddings.shape[0],
        task_type=task_type,
        modules_to_save=heads,
        placement="infix" if prompt.config["peft_type"] == INFIX_KIND else "prefix",
    )
    return prompt, config


def _refuse_names(kwargs: dict[str, Any]) -> None:
    """What a model of prefixes takes, and bases might swallow."""
    if kwargs.pop("prefix_names", None) is not None:
        raise ValueError(
            "prefix_names: got names, takes None: all rows of a batch have the active prompt; "
            "PrefixTuningModel gives each row its own"
        )


def _by_name(
    generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of ``generate()`` by name, its first one as input_ids."""
    signature = inspect.signature(generate)
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    if isinstance(given.get("generation_config"), Tensor):
        raise ValueError(
            "generation_config: got a Tensor, takes a GenerationConfig; attention_mask goes by name"
        )
    inputs = given.pop("inputs", None)
    if inputs is not None:
        if given.get("input_ids") is not None:
            raise ValueError("inputs, input_ids: got both, takes one of them")
        given["input_ids"] = inputs
    return given


def _after(
    config: PromptConfig, infix_positions: Tensor | None, mask: Tensor | None, B: int, L: int
) -> Tensor | None:
    """How many real tokens of each row come before an infix; None for a prompt in front."""
    if config.placement == "prefix":
        if infix_positions is not None:
            raise ValueError(
                f"infix_positions: got {shown(infix_positions)}, takes None with placement='prefix'"
            )
        return None
    check_tensors(infix_positions=infix_positions)
    if infix_positions is None or infix_positions.shape != (B,):
        got = None if infix_positions is None else list(infix_positions.shape)
        raise ValueError(f"infix_positions: got {got}, takes [B] = [{B}] for an infix")
    if not torch.compiler.is_compiling():
        real = L if mask is None else mask.bool().sum(1).to(infix_positions.device)
        if bool(((infix_positions < 0) | (infix_positions > real)).any()):
            raise ValueError(
                f"infix_positions: got {infix_positions.tolist()}, takes 0 to a row's number "
                "of real tokens"
            )
    return infix_positions


def _moved(places: Tensor, layout: Layout) -> Tensor:
    """Start or end tokens [B] of the text as columns of the whole; beyond it, to be ignored."""
    places = places.reshape(len(places))
    columns = layout.places().to(places.device).expand(len(places), -1)
    inside = columns.gather(1, places.clamp(0, layout.length - 1)[:, None])[:, 0]
    whole = layout.length + layout.prompt_length
    return torch.where(places < layout.length, inside, torch.full_like(inside, whole))
