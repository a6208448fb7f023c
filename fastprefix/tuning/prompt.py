"""A frozen model with a trainable prompt among its input embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.arguments import refuses_unknown_arguments
from fastprefix.files import written_together
from fastprefix.hf.hub import Source
from fastprefix.hf.patching import UnsupportedModelError, use_prefix
from fastprefix.hf.peft_base import (
    check_base_adapter,
    find_base_adapter,
    load_base_adapter,
    save_base_adapter,
    unwrap,
)
from fastprefix.hf.peft_prompts import INFIX_KIND, load_prompt, save_prompt
from fastprefix.hf.prefill import prefill_embeddings
from fastprefix.hf.versions import cache_of, length_of
from fastprefix.kv import PrefixKV
from fastprefix.tuning import hub
from fastprefix.tuning.base import (
    TunedModel,
    embedding_weight,
    initial_ids,
    load_heads,
    saved_heads,
    with_inputs_of_bases,
)
from fastprefix.tuning.checkpoint import (
    Checkpoint,
    as_it_was,
    fresh,
    load_state,
    read_checkpoint,
)
from fastprefix.tuning.config_files import PeftsOwn
from fastprefix.tuning.peft_configs import agreed, as_prompt_config, tokenizer_of
from fastprefix.tuning.prompt_config import PromptConfig
from fastprefix.tuning.prompt_encoder import PromptEncoder
from fastprefix.tuning.prompt_layout import Layout, Padding, lay_out, positions

# outputs with one entry per token, and of how many dimensions they are then
_PER_TOKEN = {"logits": 3, "last_hidden_state": 3, "start_logits": 2, "end_logits": 2}


class PromptTuningModel(TunedModel):
    """Prompt tuning, P-tuning, infix tuning: the base is frozen, its input has a trained part.

    The forward feeds the base the embeddings of prompt and text in one sequence, so that any
    model that takes ``inputs_embeds`` can be trained; nothing is patched. In front of the text of
    a causal model the prompt has keys and values of its own: :meth:`export` computes them, and
    :meth:`generate` keeps that one copy for the whole batch.

    Padding on either side changes nothing for a row: its prompt lies next to its text, and padding
    takes no positions. An encoder's rows are fed with their padding behind, the rows of a causal
    classifier, which reads the last token, with their padding in front.

    Args:
        model: the base; all its parameters are frozen.
        config: a :class:`PromptConfig`, or PEFT's PromptTuningConfig or PromptEncoderConfig; with
            inference_mode nothing is trained.
        tokenizer: the base's; needed for init="text".

    Raises:
        ValueError: init="text" without a tokenizer, or the base takes no inputs_embeds.

    Example:
        >>> tuned = PromptTuningModel(model, PromptConfig(num_virtual_tokens=32))
        >>> Trainer(tuned, arguments, train_dataset=data).train()
        >>> tuned.save_pretrained("adapter")
    """

    encoder: PromptEncoder
    config_class = PromptConfig

    def __init__(
        self,
        model: PreTrainedModel,
        config: PromptConfig | PeftsOwn,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        tokenizer = tokenizer_of(config) if tokenizer is None else tokenizer
        config = as_prompt_config(config)
        model = unwrap(model)
        taken = inspect.signature(model.forward).parameters
        if "inputs_embeds" not in taken:
            raise ValueError(f"model: {type(model).__name__} takes no inputs_embeds")
        start = initial_ids(config, model, tokenizer)  # before anything is changed
        super().__init__(model)
        self.prompt_config = config
        self.encoder = PromptEncoder(config, embedding_weight(model).shape[1]).to(model.device)
        if start is not None:
            with torch.no_grad():  # by the module, which may scale what it looks up
                embeddings = model.get_input_embeddings()(start.to(model.device))
            self.encoder.start_from(embeddings)
        self.train_heads(config.modules_to_save, config.task_type)
        if config.inference_mode:
            self.encoder.requires_grad_(False)
            self._freeze_heads()
        self._takes_positions = "position_ids" in taken
        self._is_causal = not model.config.is_encoder_decoder and (
            config.task_type == "CAUSAL_LM"
            or any(getattr(module, "is_causal", False) for module in model.modules())
        )

    @property
    def peft_config(self) -> dict[str, PromptConfig]:
        """The configuration under the name "default"; PEFT's name for it."""
        return {"default": self.prompt_config}

    @property
    def active_peft_config(self) -> PromptConfig:
        """The configuration; PEFT's name for it."""
        return self.prompt_config

    @property
    def active_adapter(self) -> str:
        """The name of the only prompt."""
        return "default"

    @property
    def active_adapters(self) -> list[str]:
        """The name of the only prompt, in a list as in PEFT."""
        return [self.active_adapter]

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

        Args:
            input_ids: [B, L].
            attention_mask: [B, L], 0 for padding on either side.
            position_ids: [B, L], counted from 0 at the text's first token.
            inputs_embeds: [B, L, hidden], in place of input_ids.
            labels: [B, L], -100 where no loss is wanted; or what the base's task takes.
            infix_positions: [B], how many of a row's real tokens come before an infix.
            kwargs: whatever else the base model's forward takes.

        Raises:
            ValueError: infix_positions are missing, out of range, or given for a prompt in front;
                the mask is not one of padding; a cache holds tokens already; the sequences are
                packed.
        """
        self._check(attention_mask, position_ids, kwargs)
        embeds = self._embeddings(input_ids, inputs_embeds)
        B, L = embeds.shape[:2]
        after = self._after(infix_positions, attention_mask, B, L)
        layout = self._layout(attention_mask, L, after)
        fed = self._fed(layout, embeds, attention_mask, position_ids, after)
        if kwargs.get("token_type_ids") is not None:
            fed["token_type_ids"] = layout.join(0, kwargs.pop("token_type_ids"))
        if labels is not None:
            fed["labels"] = layout.join(-100, labels) if self._per_token(labels, B, L) else labels
        for name in ("start_positions", "end_positions"):
            if kwargs.get(name) is not None:
                fed[name] = _moved(kwargs.pop(name), layout)
        as_tuple = kwargs.get("return_dict") is False
        output = self.base_model(**{**kwargs, **fed, "return_dict": True})
        if not self._is_encoder_decoder:
            whole = layout.length + layout.prompt_length
            for name, dims in _PER_TOKEN.items():
                value = output.get(name)
                if value is not None and value.dim() == dims and value.shape[1] == whole:
                    output[name] = layout.text(value)
        return output.to_tuple() if as_tuple else output

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        infix_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's ``generate()`` with the prompt.

        A prompt in front of a causal model's text is one copy of keys and values, which the batch
        shares; elsewhere, or where the base cannot be patched, every row is fed it.

        Args:
            input_ids: [B, L].
            attention_mask: [B, L], 0 for padding.
            infix_positions: as in :meth:`forward`; behind the text if None.
            kwargs: of the base's ``generate()``.

        Raises:
            ValueError: see :meth:`forward`.
        """
        generate: Any = self.base_model.generate  # models for other tasks have none
        kwargs["use_cache"] = kwargs.get("use_cache", True)  # the Trainer switches it off
        given = {} if attention_mask is None else {"attention_mask": attention_mask}
        if self._is_causal and self.prompt_config.placement == "prefix":
            try:
                kv = self.export()
            except (UnsupportedModelError, NotImplementedError):
                pass  # such a model takes the embeddings themselves
            else:
                self._after(infix_positions, attention_mask, *input_ids.shape)
                with use_prefix(self.base_model, kv):
                    return generate(input_ids=input_ids, **given, **kwargs)
        self._check(attention_mask, kwargs.get("position_ids"), kwargs)
        embeds = self._embeddings(input_ids, None)
        if infix_positions is None and self.prompt_config.placement == "infix":
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            infix_positions = mask.bool().sum(1)
        after = self._after(infix_positions, attention_mask, *input_ids.shape)
        layout = self._layout(attention_mask, input_ids.shape[1], after)
        fed = self._fed(layout, embeds, attention_mask, None, after)
        fed.pop("position_ids", None)  # generate() makes them of the mask
        # without one generate() would make one for the text alone
        whole = fed["inputs_embeds"].shape[:2]
        fed.setdefault("attention_mask", torch.ones(whole, dtype=torch.long, device=embeds.device))
        if self._is_encoder_decoder:
            return generate(**fed, **kwargs)
        settings = kwargs.get("generation_config")
        if getattr(settings, "max_length", None) and not getattr(settings, "max_new_tokens", None):
            raise ValueError("generation_config.max_length: takes max_new_tokens with a prompt")
        if kwargs.get("max_length") is not None:  # transformers would count the prompt
            length = kwargs.pop("max_length") - input_ids.shape[1]
            kwargs.setdefault("max_new_tokens", length)
        return generate(input_ids=input_ids, **fed, **kwargs)

    @torch.no_grad()
    def export_embeddings(self) -> Tensor:
        """The prompt as it stands, [P, width]: no dropout, no network, no graph."""
        training = self.encoder.training
        try:
            self.encoder.eval()
            return self.encoder().detach().clone()
        finally:
            self.encoder.train(training)

    def export(self) -> PrefixKV:
        """The prompt's keys and values, as the base computes them: what a batch can share.

        Raises:
            ValueError: an infix, or the base is not causal: then they depend on the text.
            UnsupportedModelError: see :func:`fastprefix.patch_model`.
        """
        if self.prompt_config.placement != "prefix" or not self._is_causal:
            raise ValueError(
                f"export: the keys and values of this prompt (placement="
                f"{self.prompt_config.placement!r}, {type(self.base_model).__name__}) depend on "
                "the text; takes a prompt in front of a causal model's text. "
                "export_embeddings() gives the prompt itself"
            )
        return prefill_embeddings(self.base_model, self.export_embeddings())

    @refuses_unknown_arguments
    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        *,
        push_to_hub: bool = False,
    ) -> None:
        """Writes the prompt, and heads trained beside it, in PEFT's format.

        A network is dropped, as PEFT does. An infix, which PEFT does not know, gets a peft_type
        of ours, so that PEFT refuses it. An adapter inside the base is written beside it, into
        the sub-folder "base_model". All files take their places together: a process that is
        killed leaves those of before, or the new ones. A model card, README.md, says what it is
        and how to load it; the text of one that is there stays.

        Args:
            save_directory: made if need be.
            safe_serialization: whether the weights are safetensors, or a file of ``torch.save``
                that PEFT reads, too.
            selected_adapters: by name; all if None.
            is_main_process: whether this process writes.
            push_to_hub: False; :meth:`push_to_hub` uploads.

        Raises:
            OSError: they cannot be written.
            ValueError: no adapter of a name, or the folder is a file; see also
                :func:`fastprefix.hf.peft_base.check_base_adapter`.
        """
        for name in selected_adapters or ():
            if name not in self.peft_config:
                raise ValueError(
                    f"selected_adapters: got {name!r}, takes one of {list(self.peft_config)}"
                )
        hub.check_directory(save_directory, push_to_hub)
        embeddings = self.export_embeddings()
        if not is_main_process:
            return
        if selected_adapters is None or selected_adapters:
            self._save_prompt(Path(save_directory), embeddings, safe_serialization)
        self.create_or_update_model_card(save_directory)

    def _save_prompt(self, folder: Path, embeddings: Tensor, safe_serialization: bool) -> None:
        """Writes the prompt, exported."""
        config, base = self.prompt_config, self.base_model.config.get_text_config()
        fields: dict[str, Any] = {
            "base_model_name_or_path": getattr(self.base_model, "name_or_path", None) or None,
            "modules_to_save": self.head_names(),
            "num_attention_heads": getattr(base, "num_attention_heads", None),
            "num_layers": getattr(base, "num_hidden_layers", None),
            "task_type": config.task_type,
        }
        if config.peft_type == "P_TUNING":
            fields["encoder_reparameterization_type"] = config.encoder_reparameterization_type
            fields["encoder_hidden_size"] = config.encoder_hidden_size or self._width
            fields["encoder_num_layers"] = config.encoder_num_layers
            fields["encoder_dropout"] = config.encoder_dropout
        check_base_adapter(folder, self.base_model)
        with written_together(folder) as partial:
            save_base_adapter(partial, self.base_model)
            save_prompt(
                partial,
                embeddings,
                fields,
                kind=config.peft_type,
                heads=self.heads(),
                safe_serialization=safe_serialization,
            )

    @classmethod
    @refuses_unknown_arguments
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str | Path,
        adapter_name: str = "default",
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
        transformers' Trainer wrote of such a model, which holds its parameters, is loaded, too.

        Args:
            model: the base; frozen. Heads that were trained beside the prompt replace its own.
            model_id: a folder, or a repository name on the Hugging Face hub.
            adapter_name: "default", which the prompt is called.
            is_trainable: whether to train the prompt further (directly; a network is gone).
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
        if adapter_name != "default":
            raise ValueError(f"adapter_name: got {adapter_name!r}, takes 'default'")
        place = Source(str(model_id), subfolder, revision, token, cache_dir)
        wanted = None if config is None else as_prompt_config(config)
        model = unwrap(model)
        if (saved := read_checkpoint(place, cls.config_class.model_class)) is not None:
            return cls._of_checkpoint(model, saved, is_trainable, wanted, place)
        prompt = load_prompt(place, embedding_weight(model).shape[1])
        found = PromptConfig(
            num_virtual_tokens=prompt.embeddings.shape[0],
            task_type=prompt.config.get("task_type"),
            modules_to_save=saved_heads(prompt.config, prompt.heads),
            placement="infix" if prompt.config["peft_type"] == INFIX_KIND else "prefix",
            inference_mode=not is_trainable,
        )
        if wanted is not None:
            found = agreed(wanted, found, place)
        inside = find_base_adapter(place)
        if inside is not None:
            load_base_adapter(model, inside, is_trainable=is_trainable)
        load_heads(model, prompt.heads)
        tuned = cls(model, found)
        tuned.encoder.start_from(prompt.embeddings)
        if not is_trainable:
            tuned.requires_grad_(False)
        return tuned.train(is_trainable)

    @classmethod
    def _of_checkpoint(
        cls,
        model: PreTrainedModel,
        saved: Checkpoint,
        is_trainable: bool,
        wanted: PromptConfig | None,
        place: Source,
    ) -> PromptTuningModel:
        (settings,) = saved.adapters.values()
        config = saved.config(PromptConfig, settings)
        if wanted is not None:
            agreed(wanted, config, place)
        with as_it_was(model, lambda _: None):
            tuned = cls(model, PromptConfig(**fresh(settings)))
            load_state(tuned, saved)
        tuned.prompt_config = replace(config, inference_mode=not is_trainable)
        if not is_trainable:
            tuned.requires_grad_(False)
        return tuned.train(is_trainable)

    @property
    def _width(self) -> int:
        return self.encoder.embedding.shape[1]

    def _embeddings(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: takes exactly one of them")
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
                "past_key_values: got a cache that holds tokens, behind which the prompt would "
                "come again; use generate(), or export() and use_prefix"
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

    def _after(
        self, infix_positions: Tensor | None, mask: Tensor | None, B: int, L: int
    ) -> Tensor | None:
        if self.prompt_config.placement == "prefix":
            if infix_positions is not None:
                raise ValueError("infix_positions: takes none with placement='prefix'")
            return None
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

    def _layout(self, mask: Tensor | None, length: int, after: Tensor | None) -> Layout:
        padding: Padding = None
        if not self._is_causal:
            padding = "last"
        elif self.prompt_config.task_type == "SEQ_CLS":
            padding = "first"
        P = self.prompt_config.num_virtual_tokens
        return lay_out(mask, length, P, after, padding)

    def _fed(
        self,
        layout: Layout,
        embeds: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        after: Tensor | None,
    ) -> dict[str, Any]:
        """Embeddings, mask and positions of prompt and text."""
        prompt = self.encoder().to(embeds.device, embeds.dtype)
        fed: dict[str, Any] = {
            "inputs_embeds": layout.join(prompt[None].expand(len(embeds), -1, -1), embeds)
        }
        if mask is not None:
            fed["attention_mask"] = layout.join(1, mask)
        if self._takes_positions and position_ids is not None:
            rows = position_ids.expand(len(embeds), -1)
            fed["position_ids"] = positions(layout, rows, mask, after)
        elif self._takes_positions and mask is not None and self._is_causal:
            fed["position_ids"] = (fed["attention_mask"].long().cumsum(1) - 1).clamp(min=0)
        return fed

    def _per_token(self, labels: Tensor, B: int, L: int) -> bool:
        return (
            labels.shape == (B, L)
            and self.prompt_config.task_type != "SEQ_CLS"
            and not self._is_encoder_decoder
        )


def _moved(places: Tensor, layout: Layout) -> Tensor:
    """Start or end tokens [B] of the text as columns of the whole; beyond it, to be ignored."""
    places = places.reshape(len(places))
    columns = layout.places().to(places.device).expand(len(places), -1)
    inside = columns.gather(1, places.clamp(0, layout.length - 1)[:, None])[:, 0]
    whole = layout.length + layout.prompt_length
    return torch.where(places < layout.length, inside, torch.full_like(inside, whole))
