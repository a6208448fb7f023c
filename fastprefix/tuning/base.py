"""What all models with a frozen base share: accounting, checkpoints, what a Trainer asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.peft import PeftAdapterMixin

from fastprefix.hf import pipelines
from fastprefix.hf.peft_base import freeze
from fastprefix.hf.versions import disable_checkpointing, enable_checkpointing, is_checkpointing
from fastprefix.tuning.config import PrefixConfig
from fastprefix.tuning.prompt_config import PromptConfig

_Forward = TypeVar("_Forward", bound=Callable[..., Any])

# PEFT's choice of what is trained beside a prompt: the layer on top, which is new with every task
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


# Methods of the base that run it, or save it, without what was trained in front of it.
_BASE_ALONE = (
    "continuous_batching_context_manager",
    "from_pretrained",
    "generate_batch",
    "init_continuous_batching",
    "push_to_hub",
    "save_pretrained",
)


class TunedModel(nn.Module):
    """A frozen base and encoders that are trained.

    What it has no attribute for is looked up in the base, as in PEFT's PeftModel.

    ``state_dict()`` holds the encoders, the heads that are trained beside them and what is trained
    inside the base, so that a trainer's checkpoints do not repeat the base.

    Args:
        model: the base; frozen, but for what PEFT's adapters inside it train.

    Attributes:
        base_model: the base.
    """

    base_model: PreTrainedModel

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        freeze(model)
        pipelines.accept(type(self).__name__)
        self.base_model = model
        self._heads: tuple[str, ...] = ()
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

    def train_heads(self, names: Iterable[str] | None, task_type: str | None = None) -> None:
        """Trains modules of the base too, and keeps them in checkpoints and adapters.

        Args:
            names: modules of the base by the last part of their names; if None, those that PEFT
                trains for the task: "classifier" and "score", or "qa_outputs".
            task_type: of the task, where names is None.

        Raises:
            ValueError: the base has no module of a given name, or one whose parameters another
                module shares (tied embeddings).
        """
        wanted = _HEADS.get(task_type or "", ()) if names is None else tuple(names)
        found = {
            name: module
            for name, module in self.base_model.named_modules()
            if name.rpartition(".")[2] in wanted
        }
        for want in () if names is None else wanted:
            if not any(name.rpartition(".")[2] == want for name in found):
                raise ValueError(
                    f"modules_to_save: got {want!r}, which {type(self.base_model).__name__} lacks"
                )
        trained = {id(p): name for name, m in found.items() for p in m.parameters()}
        for name, parameter in self.base_model.named_parameters(remove_duplicate=False):
            inside = any(name.startswith(f"{head}.") for head in found)
            if id(parameter) in trained and not inside:
                raise ValueError(
                    f"modules_to_save: got {trained[id(parameter)]!r}, whose numbers are those of "
                    f"{name!r} too, which would be trained with it; takes modules of their own"
                )
        for module in found.values():
            module.requires_grad_(True)
        self._heads = tuple(found)

    def head_names(self) -> list[str] | None:
        """The trained modules by the last part of their names; None if there are none."""
        return sorted({name.rpartition(".")[2] for name in self._heads}) or None

    def heads(self) -> dict[str, Tensor]:
        """What is trained of the base, by the names of its ``state_dict``."""
        state = self.base_model.state_dict()
        return {name: tensor for name, tensor in state.items() if self._is_head(name)}

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

    def _is_head(self, name: str) -> bool:
        return any(name.startswith(f"{head}.") for head in self._heads)

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
        return self.base_model.device

    @property
    def dtype(self) -> torch.dtype:
        """The base model's dtype; the encoder keeps float32."""
        return self.base_model.dtype

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


def load_heads(model: PreTrainedModel, heads: Mapping[str, Tensor]) -> None:
    """Puts an adapter's heads into the base.

    Raises:
        ValueError: the base has no such parameters, or of another shape. It is left as it was.
    """
    state = model.state_dict()
    for name, tensor in heads.items():
        if name not in state or state[name].shape != tensor.shape:
            has = list(state[name].shape) if name in state else "no such parameter"
            raise ValueError(
                f"adapter: holds {name} {list(tensor.shape)}, which was trained beside it; this "
                f"{type(model).__name__} has {has}"
            )
    with torch.no_grad():
        for name, tensor in heads.items():
            state[name].copy_(tensor)


def saved_heads(config: Mapping[str, Any], heads: Mapping[str, Tensor]) -> list[str] | None:
    """An adapter's modules_to_save; of PEFT's, which names what may be missing, those there are."""
    named = config.get("modules_to_save")
    parts = {part for name in heads for part in name.split(".")}
    return None if named is None else [name for name in dict.fromkeys(named) if name in parts]


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
        raise ValueError(f"tokenizer: got None, init={config.init!r} needs one")
    ids = torch.tensor(tokenizer(config.init_text)["input_ids"])
    if len(ids) == 0:
        raise ValueError(f"init_text: {config.init_text!r} has no tokens")
    return ids.repeat(-(-P // len(ids)))[:P]


def _kept(module: TunedModel) -> set[str]:
    """What a checkpoint holds of the base, by the names of its ``state_dict``."""
    trained = {name for name, x in module.base_model.named_parameters() if x.requires_grad}
    return trained | {name for name in module.base_model.state_dict() if module._is_head(name)}


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
    missing[:] = [name for name in missing if name[name.find("base_model.") :] not in frozen]
