"""What all models with a frozen base share: accounting, checkpoints, what a Trainer asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.peft import PeftAdapterMixin

from fastprefix.arguments import (
    check_type,
    methods_refuse_unknown_arguments,
    refuses_unknown_arguments,
    shown,
)
from fastprefix.hf import pipelines
from fastprefix.hf.devices import device_of, dtype_of
from fastprefix.hf.peft_base import freeze
from fastprefix.hf.versions import disable_checkpointing, enable_checkpointing, is_checkpointing
from fastprefix.tuning import hub
from fastprefix.tuning.checkpoint import EXTRA, described
from fastprefix.tuning.configs.prefix_config import PrefixConfig
from fastprefix.tuning.configs.prompt_config import PromptConfig
from fastprefix.tuning.configs.tuning_config import ConfigFiles
from fastprefix.tuning.misspelt import forward_inputs

_Forward = TypeVar("_Forward", bound=Callable[..., Any])


# Methods of the base that run it, or save it, without what was trained in front of it.
_BASE_ALONE = (
    "continuous_batching_context_manager",
    "from_pretrained",
    "generate_batch",
    "init_continuous_batching",
    "save_pretrained",
)


@methods_refuse_unknown_arguments
class TunedModel(nn.Module):
    """A frozen base and encoders that are trained.

    What it has no attribute for is looked up in the base, as in PEFT's PeftModel.

    ``state_dict()`` holds the encoders, their heads, what is trained inside the base, and the
    configurations as an entry "_extra_state", so that a trainer's checkpoints do not repeat the
    base and are enough for ``from_pretrained``.

    Args:
        model: the base; frozen, but for what PEFT's adapters inside it train.

    Attributes:
        base_model: the base.
    """

    base_model: PreTrainedModel
    config_class: ClassVar[type[ConfigFiles]]

    def __init__(self, model: PreTrainedModel) -> None:
        check_type("model", model, PreTrainedModel, "a transformers PreTrainedModel")
        super().__init__()
        freeze(model)
        pipelines.accept(type(self).__name__)
        self.base_model = model
        self._inputs = forward_inputs(model, inspect.signature(type(self).forward).parameters)
        self.register_load_state_dict_post_hook(_allow_no_base)
        self.register_state_dict_post_hook(_drop_base)

    def get_base_model(self) -> PreTrainedModel:
        """The base, without what was trained in front of it."""
        return self.base_model

    def __getattr__(self, name: str) -> Any:
        """The base's attribute of a name that this class lacks.

        Two kinds are not looked up there. A private attribute that no class of the base declares
        was hung on that one object (accelerate's hooks, torch.compile's original). A method that
        would save the base, run it alone, or switch a LoRA inside it, is not what a caller means.

        Raises:
            AttributeError: neither has it, or it is of those two kinds.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # while a copy is made, before it has any
                raise
            private = name.startswith("_")
            if private and (name.startswith("__") or not hasattr(type(self.base_model), name)):
                raise
        if name in _BASE_ALONE or (not private and hasattr(PeftAdapterMixin, name)):
            raise AttributeError(
                f"{type(self).__name__} has no {name}; the base model's, which leaves out what is "
                f"trained here, is base_model.{name}"
            )
        return getattr(self.base_model, name)

    @refuses_unknown_arguments
    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Sequence[str] | None = None,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
    ) -> Any:
        """Uploads what :meth:`save_pretrained` writes to the Hugging Face hub.

        The text of a card that the repository has stays.

        Args:
            repo_id: the repository, made if need be.
            commit_message: "Upload adapter" if None.
            commit_description: of the commit.
            private: whether a repository that is made is private; as its owner's default if None.
            token: the hub's; the one that is stored on this machine if None.
            revision: the branch, made if need be; "main" if None.
            create_pr: whether to open a pull request instead of committing.
            tags: further ones for the card.
            safe_serialization: of :meth:`save_pretrained`.
            selected_adapters: of :meth:`save_pretrained`.

        Returns:
            What ``huggingface_hub.HfApi.upload_folder`` tells of the commit.

        Raises:
            ValueError: see :meth:`save_pretrained`.
        """
        return hub.push(
            self,
            repo_id,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tags=tags,
            safe_serialization=safe_serialization,
            selected_adapters=selected_adapters,
        )

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Writes README.md, or adds to its metadata; the text of one that is there stays.

        Args:
            output_dir: exists.
        """
        hub.write_card(self, Path(output_dir))

    def get_extra_state(self) -> Tensor:
        """The configurations, as an entry of ``state_dict()``: a checkpoint is then enough."""
        names = list(self.peft_config)
        configs = {name: self._config_as_it_stands(name) for name in names}
        return described(self.config_class.model_class, configs, self.active_adapter)

    def _config_as_it_stands(self, adapter_name: str) -> Any:
        """A configuration of a model with an adapter's present parameters."""
        return self.peft_config[adapter_name]

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: a model has its adapters before their parameters are loaded."""

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

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.base_model.generation_config = config

    @property
    def loss_function(self) -> Any:
        """The base model's loss function; setting it sets the base's."""
        return self.base_model.loss_function

    @loss_function.setter
    def loss_function(self, function: Any) -> None:
        self.base_model.loss_function = function

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """True: the Trainer takes a quantised base if something trainable is attached to it."""
        return True

    def get_input_embeddings(self) -> nn.Module:
        """The base model's module that embeds tokens."""
        embeddings: nn.Module = self.base_model.get_input_embeddings()
        return embeddings

    def _get_name(self) -> str:
        """The base's, by which the Trainer knows that a smoothed loss is the next token's."""
        return self.base_model._get_name()

    def __repr__(self) -> str:
        """As of any module, under its own name."""
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    @property
    def device(self) -> torch.device:
        """The base model's device."""
        return device_of(self.base_model)

    @property
    def dtype(self) -> torch.dtype:
        """The base model's dtype; the encoder keeps float32."""
        return dtype_of(self.base_model)

    @property
    def tp_size(self) -> int | None:
        """Over how many ranks transformers sharded the base's heads; None if it did not."""
        return self.base_model.tp_size

    _tp_size = tp_size  # what the Trainer divides by, so that these ranks see the same rows

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base's loss takes num_items_in_batch, for gradient accumulation."""
        return getattr(self.base_model, "accepts_loss_kwargs", True)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether the backward recomputes activations."""
        return is_checkpointing(self.base_model)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The older name of :attr:`is_activation_checkpointing`, which older Trainers read."""
        return self.is_activation_checkpointing

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recomputes activations in the backward instead of keeping them.

        Args:
            activation_checkpointing_kwargs: of ``torch.utils.checkpoint.checkpoint``; a prefix
                of keys and values refuses the reentrant variant in the next forward.
            kwargs: of the base model's method of this name.
        """
        chosen = activation_checkpointing_kwargs or {"use_reentrant": False}
        enable_checkpointing(self.base_model, chosen, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Keeps activations again."""
        disable_checkpointing(self.base_model)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of :meth:`activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of :meth:`activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()


# What bases take beside what every wrapper's forward names.
_INPUTS = (
    "token_type_ids",
    "pixel_values",
    "input_features",
    "decoder_input_ids",
    "decoder_attention_mask",
    "decoder_inputs_embeds",
    "start_positions",
    "end_positions",
)


def with_inputs_of_bases(forward: _Forward) -> _Forward:
    """Makes the signature of a forward name what its ``**kwargs`` take for the base.

    transformers.Trainer drops every column of a data set that the signature does not name.
    """
    signature = inspect.signature(forward)
    *named, rest = signature.parameters.values()
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in _INPUTS]
    told: Any = forward
    told.__signature__ = signature.replace(parameters=[*named, *more, rest])
    return forward


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """[vocabulary, hidden]."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def initial_ids(
    config: PrefixConfig | PromptConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Tensor | None:
    """[P] token ids that training starts from; None for a random start.

    Raises:
        ValueError: a text without a tokenizer, or without tokens, or a model that reads none.
    """
    P = config.num_virtual_tokens
    if config.init == "random":
        return None
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"init: got {config.init!r}, takes 'random' for this {type(model).__name__}, which "
            f"reads {model.main_input_name} and no text"
        )
    if config.init == "vocab":
        return torch.randint(embedding_weight(model).shape[0], (P,))
    if tokenizer is None:
        raise ValueError(f"tokenizer: got None, takes the model's with init={config.init!r}")
    if not callable(tokenizer):
        raise TypeError(f"tokenizer: got {shown(tokenizer)}, takes the model's tokenizer")
    ids = torch.tensor(tokenizer(config.init_text)["input_ids"])
    if len(ids) == 0:
        raise ValueError(f"init_text: got {config.init_text!r}, takes a text with tokens")
    return ids.repeat(-(-P // len(ids)))[:P]


def _kept(module: TunedModel) -> set[str]:
    """What a checkpoint holds of the base, by the names of its ``state_dict``."""
    return {name for name, x in module.base_model.named_parameters() if x.requires_grad}


def _drop_base(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """What is frozen lives in files of its own: a checkpoint holds what is trained alone."""
    assert isinstance(module, TunedModel)
    start, kept = f"{prefix}base_model.", _kept(module)
    for name in [name for name in state if name.startswith(start)]:
        if name.removeprefix(start) not in kept:
            del state[name]


def _allow_no_base(module: nn.Module, incompatible: Any) -> None:
    """Loading such a checkpoint misses nothing."""
    assert isinstance(module, TunedModel)
    frozen = {
        f"base_model.{name}" for name in module.base_model.state_dict().keys() - _kept(module)
    }
    missing = incompatible.missing_keys
    missing[:] = [
        name
        for name in missing
        if name[name.find("base_model.") :] not in frozen
        and name.rpartition(".")[2] != EXTRA  # of checkpoints from before there was one
    ]
