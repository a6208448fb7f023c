"""A frozen model with a trainable prompt among its input embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.arguments import check_type, methods_refuse_unknown_arguments
from fastprefix.encoders import evaluating
from fastprefix.formats.peft_prompts import INFIX_KIND, Prompt, load_prompt, save_prompt
from fastprefix.formats.source import Source
from fastprefix.hf.patch.patching import use_prefix
from fastprefix.hf.patch.probe import UnsupportedModelError
from fastprefix.hf.patch.threads import wanting_none
from fastprefix.hf.prefill.prompts import prefill_embeddings
from fastprefix.kv import PrefixKV
from fastprefix.tuning.adapter_names import DEFAULT
from fastprefix.tuning.configs.accepted import as_prompt_config, tokenizer_of
from fastprefix.tuning.configs.prompt_config import PromptConfig
from fastprefix.tuning.configs.tuning_config import PeftConfigLike
from fastprefix.tuning.find_heads import check_saved_heads, find_heads, saved_head_names
from fastprefix.tuning.generate_arguments import arguments_by_name, count_new_tokens
from fastprefix.tuning.initial_values import embedding_weight
from fastprefix.tuning.misspelt import check_tensors, refuse_misspelt, refuse_misspelt_option
from fastprefix.tuning.new_encoders import new_prompt_encoder
from fastprefix.tuning.peft_base import unwrap
from fastprefix.tuning.prompt_encoder import PromptEncoder
from fastprefix.tuning.prompt_inputs import (
    check_text,
    join_inputs,
    join_targets,
    keep_text_outputs,
    text_embeddings,
    tokens_before_prompt,
)
from fastprefix.tuning.prompt_layout import Padding, PromptLayout, lay_out
from fastprefix.tuning.saved_adapters import SavedAdapters
from fastprefix.tuning.trainer_contract import with_inputs_of_bases


@methods_refuse_unknown_arguments
class PromptTuningModel(SavedAdapters):
    """Prompt tuning, P-tuning, infix tuning: the base is frozen, and its input has a trained part.

    The forward gives the base the embeddings of prompt and text as one sequence. So it works with
    every model that accepts ``inputs_embeds``, and patches nothing. In front of a causal model's
    text the prompt's keys and values do not depend on the text. :meth:`export` computes them, and
    :meth:`generate` uses that one copy for the whole batch.

    The model may hold several prompts by name. All rows of a batch have the active one.

    Padding on either side does not change a row's results: the prompt lies next to the row's text,
    and padding takes up no positions. For an encoder, padding is moved to the end of a row. For a
    causal classifier, which reads the last token, it is moved to the front.

    Args:
        model: the base; all its parameters are frozen.
        config: a :class:`PromptConfig`, or PEFT's PromptTuningConfig or PromptEncoderConfig. With
            inference_mode nothing is trained.
        tokenizer: the base's; needed for init="text".
        adapter_name: the name of the first prompt.

    Raises:
        ValueError: init="text" needs a tokenizer, or the base accepts no inputs_embeds.

    Example:
        >>> tuned = PromptTuningModel(model, PromptConfig(num_virtual_tokens=32))
        >>> Trainer(tuned, arguments, train_dataset=data).train()
        >>> tuned.save_pretrained("adapter")
    """

    config_class = PromptConfig

    def __init__(
        self,
        model: PreTrainedModel,
        config: PromptConfig | PeftConfigLike,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapter_name: str = DEFAULT,
    ) -> None:
        tokenizer = tokenizer_of(config) if tokenizer is None else tokenizer
        config = as_prompt_config(config)
        model = unwrap(model)
        check_type("model", model, PreTrainedModel, "a transformers PreTrainedModel")
        accepted = inspect.signature(model.forward).parameters
        if "inputs_embeds" not in accepted:
            raise ValueError(
                f"model: got {type(model).__name__}, takes one whose forward has inputs_embeds"
            )
        find_heads(model, config.modules_to_save, config.task_type)  # before anything is changed
        encoder = new_prompt_encoder(model, config, tokenizer)
        super().__init__(model, adapter_name, config, encoder)
        self._takes_positions = "position_ids" in accepted
        self._has_causal_layers = any(getattr(x, "is_causal", False) for x in model.modules())

    def _new_adapter(
        self, config: PromptConfig | PeftConfigLike, tokenizer: PreTrainedTokenizerBase | None
    ) -> tuple[PromptConfig, PromptEncoder]:
        tokenizer = tokenizer_of(config) if tokenizer is None else tokenizer
        config = as_prompt_config(config)
        return config, new_prompt_encoder(self.base_model, config, tokenizer)

    @property
    def encoder(self) -> PromptEncoder:
        """The active prompt's encoder."""
        return self._encoder(self._known_name(None))

    @property
    def prompt_configs(self) -> dict[str, PromptConfig]:
        """The prompts' configurations."""
        return self._configs

    @property
    def prompt_config(self) -> PromptConfig:
        """The active prompt's configuration."""
        return self.prompt_configs[self._known_name(None)]

    @property
    def loss_type(self) -> None:
        """None: the loss counts all labels, because the prompt predicts the first token too."""
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
        """Runs the base model with the prompt. Masks, positions and labels are those of the text.

        The outputs of each token (logits, start_logits, end_logits, last_hidden_state) are those of
        the text, too; for padding they are undefined. hidden_states and past_key_values include the
        prompt. Under :meth:`disable_adapter` this is the base model's own forward.

        Args:
            input_ids: [B, L].
            attention_mask: [B, L], 0 for padding on either side.
            position_ids: [B, L], counted from 0 at the text's first token.
            inputs_embeds: [B, L, hidden], in place of input_ids.
            labels: [B, L], -100 where no loss is wanted; or what the base's task needs.
            infix_positions: [B], how many of a row's real tokens come before an infix.
            kwargs: other arguments of the base model's forward.

        Raises:
            TypeError: an unknown argument looks like a misspelt one, or an input is no tensor.
            ValueError: infix_positions are missing, out of range, or given for a prompt in front;
                the mask is not one of padding; a cache holds tokens already; sequences are packed;
                prefix_names are given; or no prompt is active.
        """
        _refuse_names(kwargs)
        refuse_misspelt("forward", kwargs, self._inputs)
        check_tensors(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds
        )
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        if self._adapters_disabled:
            kwargs.update({name: value for name, value in given.items() if value is not None})
            with self._use_heads([None]), wanting_none():
                return self.base_model(**kwargs)
        name = self._known_name(None)
        with self._use_heads([name]):
            return self._forward(name, given, infix_positions, kwargs)

    def _forward(
        self,
        name: str,
        given: dict[str, Tensor | None],
        infix_positions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """The forward with a prompt.

        Args:
            name: the prompt's name.
            given: the inputs that :meth:`forward` names.
            infix_positions: see :meth:`forward`.
            kwargs: other arguments of the base's forward.
        """
        mask, position_ids, labels = map(given.get, ("attention_mask", "position_ids", "labels"))
        check_text(mask, position_ids, kwargs, self._is_encoder_decoder)
        embeds = text_embeddings(self.base_model, given["input_ids"], given["inputs_embeds"])
        layout, joined = self._join(name, embeds, mask, position_ids, infix_positions)
        per_token = (
            labels is not None
            and labels.shape == embeds.shape[:2]
            and self.prompt_configs[name].task_type != "SEQ_CLS"
            and not self._is_encoder_decoder
        )
        joined |= join_targets(layout, kwargs, labels, per_token)
        as_tuple = kwargs.get("return_dict") is False
        with wanting_none():  # another thread may have set a prefix for its own calls
            output = self.base_model(**{**kwargs, **joined, "return_dict": True})
        if not self._is_encoder_decoder:
            keep_text_outputs(layout, output)
        return output.to_tuple() if as_tuple else output

    @torch.no_grad()
    def generate(self, *args: Any, infix_positions: Tensor | None = None, **kwargs: Any) -> Any:
        """Runs the base model's ``generate()`` with the prompt.

        In front of a causal model's text, the prompt is one copy of keys and values that the batch
        shares. In other models, and in a base that cannot be patched, each row gets the prompt's
        embeddings. The result, and what max_length counts, is the text without the prompt. If only
        inputs_embeds are given, the result is the new tokens.

        Args:
            args: positional arguments of the base's method: first the token ids [B, L].
            infix_positions: see :meth:`forward`; if None, an infix comes behind the text.
            kwargs: arguments of the base's method. Among them are input_ids [B, L] or inputs_embeds
                [B, L, hidden], and attention_mask [B, L], 0 for padding.

        Raises:
            TypeError: there are more positional arguments than the base's method has.
            ValueError: see :meth:`forward`.
        """
        _refuse_names(kwargs)
        generate: Any = self.base_model.generate  # models for other tasks have none
        refuse_misspelt_option(generate, kwargs, self._inputs)
        given = arguments_by_name(generate, args, kwargs)
        if given.get("use_cache") is None:
            given["use_cache"] = True  # the Trainer switches it off
        if self._adapters_disabled:
            with self._use_heads([None]), wanting_none():
                return generate(**given)
        name = self._known_name(None)
        with self._use_heads([name]):
            return self._generate(name, generate, infix_positions, given)

    def _generate(
        self,
        name: str,
        generate: Callable[..., Any],
        infix_positions: Tensor | None,
        given: dict[str, Any],
    ) -> Any:
        """``generate()`` with a prompt.

        Args:
            name: the prompt's name.
            generate: the base's method.
            infix_positions: see :meth:`generate`.
            given: arguments of the base's method by name.
        """
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
                pass  # the base cannot be patched: each row gets the prompt's embeddings
            else:
                tokens_before_prompt(config, infix_positions, mask, B, L)
                with use_prefix(self.base_model, kv):
                    return generate(**text, **given)
        check_text(mask, given.get("position_ids"), given, self._is_encoder_decoder)
        if embeds is None or self._is_encoder_decoder:  # an encoder-decoder accepts only one
            embeds = text_embeddings(self.base_model, ids, embeds)
        if infix_positions is None and config.placement == "infix":
            real = torch.ones(B, L, device=first.device) if mask is None else mask
            infix_positions = real.bool().sum(1)
        _, joined = self._join(name, embeds, mask, None, infix_positions)
        joined.pop("position_ids", None)  # generate() makes them of the mask
        # without a mask generate() would make one that is as long as the text
        ones = torch.ones(joined["inputs_embeds"].shape[:2], dtype=torch.long, device=embeds.device)
        joined.setdefault("attention_mask", ones)
        if not self._is_encoder_decoder:
            count_new_tokens(given, L)
            if ids is not None:
                joined["input_ids"] = ids
        with wanting_none():
            return generate(**joined, **given)

    @torch.no_grad()
    def export_embeddings(self, adapter_name: str | None = None) -> Tensor:
        """Returns a prompt's present embeddings [P, width], without dropout, network and graph.

        Args:
            adapter_name: the prompt; the active one if None.

        Raises:
            ValueError: there is no adapter of this name.
        """
        return evaluating(self._encoder(self._known_name(adapter_name)))().detach().clone()

    def export(self, adapter_name: str | None = None) -> PrefixKV:
        """Computes a prompt's keys and values with the base. A whole batch can share them.

        The base runs with the prompt's heads, because heads inside its layers change the result.

        Args:
            adapter_name: the prompt; the active one if None.

        Raises:
            ValueError: there is no adapter of this name; or keys and values depend on the text,
                because the prompt is an infix or the base is not causal.
            UnsupportedModelError: see :func:`fastprefix.patch_model`.
        """
        name = self._known_name(adapter_name)
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
        fields = self._shared_fields(adapter_name)
        fields["num_attention_heads"] = getattr(base, "num_attention_heads", None)
        fields["num_layers"] = getattr(base, "num_hidden_layers", None)
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

    @classmethod
    def _read_adapter(cls, place: Source, model: PreTrainedModel) -> tuple[Prompt, PromptConfig]:
        prompt = load_prompt(place, embedding_weight(model).shape[1])
        task_type = prompt.config.get("task_type")
        heads = saved_head_names(prompt.config, prompt.heads)
        check_saved_heads(model, prompt.heads, heads, task_type)
        config = PromptConfig(
            num_virtual_tokens=prompt.embeddings.shape[0],
            task_type=task_type,
            modules_to_save=heads,
            placement="infix" if prompt.config["peft_type"] == INFIX_KIND else "prefix",
        )
        return prompt, config

    @classmethod
    def _as_config(cls, config: Any) -> PromptConfig:
        return as_prompt_config(config)

    def _start_from(self, adapter_name: str, saved: Prompt) -> None:
        self._encoder(adapter_name).start_from(saved.embeddings)
        self._load_heads(adapter_name, saved.heads)

    def _encoder(self, adapter_name: str) -> PromptEncoder:
        encoder = self.encoders[adapter_name]
        assert isinstance(encoder, PromptEncoder)
        return encoder

    @property
    def _is_encoder_decoder(self) -> bool:
        return bool(self.base_model.config.is_encoder_decoder)

    def _is_causal(self, config: PromptConfig) -> bool:
        """Whether the states of a prompt in front of a text do not depend on the text."""
        causal = config.task_type == "CAUSAL_LM" or self._has_causal_layers
        return causal and not self._is_encoder_decoder

    def _join(
        self,
        name: str,
        embeds: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        infix_positions: Tensor | None,
    ) -> tuple[PromptLayout, dict[str, Tensor]]:
        """Puts a prompt among the embeddings of a text, with its mask and positions."""
        config = self.prompt_configs[name]
        is_causal = self._is_causal(config)
        B, L = embeds.shape[:2]
        tokens_before = tokens_before_prompt(config, infix_positions, mask, B, L)
        padding: Padding = None
        if not is_causal:
            padding = "last"
        elif config.task_type == "SEQ_CLS":
            padding = "first"
        layout = lay_out(mask, L, config.num_virtual_tokens, tokens_before, padding)
        if not self._takes_positions:
            position_ids = None
        prompt = self._encoder(name)()
        joined = join_inputs(layout, prompt, embeds, mask, position_ids, tokens_before)
        if self._takes_positions and position_ids is None and mask is not None and is_causal:
            seen = joined["attention_mask"].long().cumsum(1)
            joined["position_ids"] = (seen - 1).clamp(min=0)
        return layout, joined


def _refuse_names(kwargs: dict[str, Any]) -> None:
    """Refuses prefix_names, which PrefixTuningModel accepts and a base might ignore."""
    if kwargs.pop("prefix_names", None) is not None:
        raise ValueError(
            "prefix_names: got names, takes None: all rows of a batch have the active prompt; "
            "PrefixTuningModel gives each row its own"
        )
