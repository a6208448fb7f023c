"""fastprefix and PEFT behind the names that PEFT uses, on nine tiny models.

Tests get a library with a model and a method as the fixture ``cell``. What differs between the
two stands here and nowhere else: how a configuration is made, which class loads a folder, and how
a row of a batch names its adapter.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel, PromptConfig, PromptTuningModel
from fastprefix_testing import zoo

P = 4
LABELS = 3
# name: the zoo's, the class if another, the task, what changes
MODELS: dict[str, tuple[str, str | None, str, dict[str, Any]]] = {
    # PEFT takes a head to be as wide as hidden_size / num_attention_heads
    "llama": ("llama", None, "CAUSAL_LM", {"head_dim": 8}),
    "qwen3": ("qwen3", None, "CAUSAL_LM", {"head_dim": 8}),
    "gpt2": ("gpt2", None, "CAUSAL_LM", {}),
    "opt": ("opt", None, "CAUSAL_LM", {}),
    "bart": ("bart", None, "SEQ_2_SEQ_LM", {}),
    "t5": ("t5", None, "SEQ_2_SEQ_LM", {}),
    "bert_cls": ("bert", "BertForSequenceClassification", "SEQ_CLS", {}),
    "roberta_cls": ("roberta", "RobertaForSequenceClassification", "SEQ_CLS", {}),
    "llama_cls": ("llama", "LlamaForSequenceClassification", "SEQ_CLS", {"head_dim": 8}),
}
METHODS = ("prefix", "projection", "cartridge", "prompt", "p_tuning")
KINDS = {
    "prefix": "PREFIX_TUNING",
    "projection": "PREFIX_TUNING",
    "cartridge": "CARTRIDGE",
    "prompt": "PROMPT_TUNING",
    "p_tuning": "P_TUNING",
}


class Case:
    """A library with a model and a method.

    Attributes:
        library: "fastprefix" or "peft".
        model: one of MODELS.
        method: one of METHODS.
        task_type: of the model, as PEFT names it.
        peft_type: of the method, as PEFT names it.
        loaded_type: the same, once loaded.
        P: how many virtual tokens there are.
    """

    library: str
    P = P

    def __init__(self, model: str, method: str) -> None:
        self.model, self.method = model, method
        self.task_type = MODELS[model][2]
        self.peft_type = KINDS[method]

    @property
    def loaded_type(self) -> str:
        return self.peft_type

    # models

    def base(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """A new copy of the model, with the same weights each time."""
        model: Any = copy.deepcopy(_base(self.model))
        return model.to(dtype)

    def config(self, **fields: Any) -> Any:
        """A new configuration of the method."""
        raise NotImplementedError

    def wrap(self, base: PreTrainedModel, config: Any, adapter_name: str) -> Any:
        """The base with a new adapter."""
        raise NotImplementedError

    def load(self, folder: Path, base: PreTrainedModel | None = None, **kwargs: Any) -> Any:
        """Loads what was saved: ``from_pretrained`` with these keywords, on a new base."""
        raise NotImplementedError

    def rows(self, names: list[str | None]) -> dict[str, Any]:
        """The keyword by which each row of a batch names its adapter; None for none."""
        raise NotImplementedError

    def make(
        self,
        base: PreTrainedModel | None = None,
        adapter_name: str = "default",
        seed: int = 0,
        **fields: Any,
    ) -> Any:
        """A base in eval mode, with an adapter whose numbers are large enough to matter."""
        base = self.base() if base is None else base
        torch.manual_seed(seed)  # a cartridge's frozen tokens stay what they are
        tuned = self.wrap(base, self.config(**fields), adapter_name)
        named = tuned.named_parameters()
        self._fill([p for n, p in named if p.requires_grad or adapter_name in n.split(".")], seed)
        return tuned.eval()

    def exchanged(self) -> dict[str, Any]:
        """Fields of a configuration that the other library can run."""
        return {}

    def add(self, tuned: Any, adapter_name: str, seed: int) -> None:
        """Adds an adapter with other numbers. The active adapter stays the same."""
        tuned.add_adapter(adapter_name, self.config())
        named = tuned.named_parameters()
        self._fill([p for name, p in named if adapter_name in name.split(".")], seed)

    def saved(self, tuned: Any, folder: Path, **kwargs: Any) -> dict[str, Tensor]:
        """The tensors that ``save_pretrained`` writes. An encoder's prefix has its own file."""
        tuned.save_pretrained(folder, **kwargs)
        files = sorted(folder.glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    @staticmethod
    def _fill(parameters: list[Tensor], seed: int) -> None:
        assert parameters
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in parameters:
                parameter.normal_(0, 0.5, generator=generator)

    # what they run on

    def batch(self) -> dict[str, Tensor]:
        """Inputs padded on the right, where both libraries count positions in the same way."""
        # the last token is what a causal classifier reads, which PEFT's must not be padding
        ids, mask = tiny.batch((6, 6) if self.model == "llama_cls" else (6, 4), "right")
        inputs = {"input_ids": ids.clamp(min=3) * mask, "attention_mask": mask}
        if self.task_type == "SEQ_2_SEQ_LM":
            inputs["decoder_input_ids"] = tiny.batch((5, 5))[0]
        return inputs

    def labelled(self) -> dict[str, Tensor]:
        """The same inputs with labels. A first token has none, since no output predicts it."""
        inputs = self.batch()
        if self.task_type == "CAUSAL_LM":
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            labels[:, 0] = -100
        elif self.task_type == "SEQ_CLS":
            labels = torch.tensor([0, 2])
        else:
            labels = inputs.pop("decoder_input_ids")
        return {**inputs, "labels": labels}

    def text(self) -> dict[str, Tensor]:
        """Inputs for generate(): rows of one length."""
        ids = tiny.batch((5, 5))[0].clamp(min=3)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def generate(self, tuned: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Generates: greedy and a few tokens, unless told otherwise. Returns all token ids."""
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": tiny.PAD}
        if "max_length" in kwargs:
            del options["max_new_tokens"]
        return tuned.generate(*args, **{**options, **kwargs})

    def embed(self, tuned: Any, ids: Tensor) -> Tensor:
        """What ``inputs_embeds`` takes for these tokens."""
        with torch.no_grad():
            embeddings: Tensor = tuned.get_base_model().get_input_embeddings()(ids)
        return embeddings

    def logits(self, tuned: Any, **inputs: Any) -> Tensor:
        """The logits of the text's real tokens, without those that PEFT adds for a prompt."""
        with torch.no_grad():
            return self.real(tuned(**inputs).logits, inputs["attention_mask"])

    def real(self, logits: Tensor, mask: Tensor) -> Tensor:
        """The part of the logits that belongs to the text's real tokens."""
        if self.task_type != "CAUSAL_LM":
            return logits
        return logits[:, -mask.shape[1] :][mask.bool()]

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy that the labels ask for."""
        if self.task_type == "CAUSAL_LM":
            logits, labels = logits[:, -labels.shape[1] : -1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


class Ours(Case):
    """fastprefix."""

    library = "fastprefix"

    @property
    def _is_prompt(self) -> bool:
        return self.method in ("prompt", "p_tuning")

    @property
    def loaded_type(self) -> str:
        # the network is in no file: what trains on is a prompt
        return "PROMPT_TUNING" if self.method == "p_tuning" else self.peft_type

    def config(self, **fields: Any) -> Any:
        fields = {"num_virtual_tokens": P, "task_type": self.task_type, **fields}
        if self.method == "projection":
            fields |= {"prefix_projection": True, "encoder_hidden_size": 8}
        if self.method == "cartridge":
            fields |= {"peft_type": "CARTRIDGE", "num_frozen_tokens": 1}
        if self.method == "p_tuning":
            fields |= {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 8}
        return PromptConfig(**fields) if self._is_prompt else PrefixConfig(**fields)

    def wrap(self, base: PreTrainedModel, config: Any, adapter_name: str) -> Any:
        if self._is_prompt:
            return PromptTuningModel(base, config, adapter_name=adapter_name)
        # what the check compares, it compares in tests of its own; it is most of the time here
        return PrefixTuningModel(base, config, adapter_name=adapter_name, check=False)

    def load(self, folder: Path, base: PreTrainedModel | None = None, **kwargs: Any) -> Any:
        base = self.base() if base is None else base
        if self._is_prompt:
            return PromptTuningModel.from_pretrained(base, folder, **kwargs)
        return PrefixTuningModel.from_pretrained(base, folder, check=False, **kwargs)

    def rows(self, names: list[str | None]) -> dict[str, Any]:
        return {"prefix_names": names}

    def exchanged(self) -> dict[str, Any]:
        # PEFT has no prefixes of an encoder, nor of the attention to it, and counts positions on
        if self.task_type == "SEQ_2_SEQ_LM" and not self._is_prompt:
            return {"groups": ["decoder"], "position_offset": P}
        return {}


class Theirs(Case):
    """PEFT."""

    library = "peft"

    def config(self, **fields: Any) -> Any:
        fields = {"num_virtual_tokens": P, "task_type": self.task_type, **fields}
        if self.method == "projection":
            fields |= {"prefix_projection": True, "encoder_hidden_size": 8}
        if self.method == "p_tuning":
            fields |= {"encoder_hidden_size": 8}
        make: dict[str, Any] = {
            "PREFIX_TUNING": peft.PrefixTuningConfig,
            "CARTRIDGE": peft.CartridgeConfig,
            "PROMPT_TUNING": peft.PromptTuningConfig,
            "P_TUNING": peft.PromptEncoderConfig,
        }
        return make[KINDS[self.method]](**fields)

    def wrap(self, base: PreTrainedModel, config: Any, adapter_name: str) -> Any:
        return peft.get_peft_model(base, config, adapter_name=adapter_name)

    def load(self, folder: Path, base: PreTrainedModel | None = None, **kwargs: Any) -> Any:
        return peft.PeftModel.from_pretrained(
            self.base() if base is None else base, folder, **kwargs
        )

    def rows(self, names: list[str | None]) -> dict[str, Any]:
        return {"adapter_names": [name or "__base__" for name in names]}


LIBRARIES: dict[str, type[Case]] = {"fastprefix": Ours, "peft": Theirs}


@functools.cache
def _base(name: str) -> PreTrainedModel:
    like, model_class, _, changes = MODELS[name]
    if model_class is not None:
        changes = {**changes, "num_labels": LABELS}
    model: PreTrainedModel = zoo.kind(like, torch.float32, model_class, **changes)
    if model.can_generate():
        model.generation_config.eos_token_id = None  # as many new tokens as are asked for
    return model
