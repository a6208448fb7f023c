"""A frozen model with a trainable prompt among its input embeddings."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.hf.patching import UnsupportedModelError, use_prefix
from fastprefix.hf.peft_base import (
    find_base_adapter,
    load_base_adapter,
    save_base_adapter,
    unwrap,
)
from fastprefix.hf.peft_prompts import INFIX_KIND, load_prompt, save_prompt
from fastprefix.hf.prefill import prefill_embeddings
from fastprefix.hf.versions import cache_of, length_of
from fastprefix.kv import PrefixKV
from fastprefix.tuning.base import (
    TunedModel,
    embedding_weight,
    initial_ids,
    load_heads,
    saved_heads,
    with_inputs_of_bases,
)
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
        config: see :class:`PromptConfig`.
        tokenizer: the base's; needed for init="text".

    Raises:
        ValueError: init="text" without a tokenizer, or the base takes no inputs_embeds.

    Example:
        >>> tuned = PromptTuningModel(model, PromptConfig(num_virtual_tokens=32))
        >>> Trainer(tuned, arguments, train_dataset=data).train()
        >>> tuned.save_pretrained("adapter")
    """

    encoder: PromptEncoder

    def __init__(
        self,
        model: PreTrainedModel,
        config: PromptConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
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

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Writes the prompt, and heads trained beside it, in PEFT's format.

        A network is dropped, as PEFT does. An infix, which PEFT does not know, gets a peft_type
        of ours, so that PEFT refuses it. An adapter inside the base is written beside it, into
        the sub-folder "base_model".

        Raises:
            ValueError: see :func:`fastprefix.hf.peft_base.save_base_adapter`.
        """
        config, base = self.prompt_config, self.base_model.config.get_text_config()
        kind = "P_TUNING" if config.encoder_reparameterization_type else "PROMPT_TUNING"
        fields: dict[str, Any] = {
            "base_model_name_or_path": getattr(self.base_model, "name_or_path", None) or None,
            "modules_to_save": self.head_names(),
            "num_attention_heads": getattr(base, "num_attention_heads", None),
            "num_layers": getattr(base, "num_hidden_layers", None),
            "task_type": config.task_type,
        }
        if config.placement == "infix":
            kind = INFIX_KIND
        elif kind == "P_TUNING":
            fields["encoder_reparameterization_type"] = config.encoder_reparameterization_type
            fields["encoder_hidden_size"] = config.encoder_hidden_size or self._width
            fields["encoder_num_layers"] = config.encoder_num_layers
            fields["encoder_dropout"] = config.encoder_dropout
        save_base_adapter(Path(folder), self.base_model)
        save_prompt(folder, self.export_embeddings(), fields, kind=kind, heads=self.heads())

    @classmethod
    def from_pretrained(
        cls, model: PreTrainedModel, name_or_folder: str | Path, *, is_trainable: bool = False
    ) -> PromptTuningModel:
        """Loads a PROMPT_TUNING or P_TUNING adapter that fastprefix or PEFT saved.

        With it comes the adapter inside the base that was saved beside it.

        Args:
            model: the base; frozen. Heads that were trained beside the prompt replace its own.
            name_or_folder: a folder, or a repository name on the Hugging Face hub.
            is_trainable: whether to train the prompt further (directly; a network is gone).

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: not an input-level prompt for this model.
        """
        model = unwrap(model)
        prompt = load_prompt(name_or_folder, embedding_weight(model).shape[1])
        config = PromptConfig(
            num_virtual_tokens=prompt.embeddings.shape[0],
            task_type=prompt.config.get("task_type"),
            modules_to_save=saved_heads(prompt.config, prompt.heads),
            placement="infix" if prompt.config["peft_type"] == INFIX_KIND else "prefix",
        )
        inside = find_base_adapter(name_or_folder)
        if inside is not None:
            load_base_adapter(model, inside, is_trainable=is_trainable)
        load_heads(model, prompt.heads)
        tuned = cls(model, config)
        tuned.encoder.start_from(prompt.embeddings)
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
