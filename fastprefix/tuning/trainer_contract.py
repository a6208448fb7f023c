"""Attributes and methods that transformers.Trainer expects of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from fastprefix.hf.devices import device_of, dtype_of
from fastprefix.hf.versions import disable_checkpointing, enable_checkpointing, is_checkpointing

_Forward = TypeVar("_Forward", bound=Callable[..., Any])

# Inputs of some bases' forwards that the wrappers' own forwards do not name.
_INPUTS_OF_BASES = (
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
    """Adds to the signature of a forward the inputs of bases that it passes on by ``**kwargs``.

    transformers.Trainer drops every column of a data set that the signature does not name.
    """
    signature = inspect.signature(forward)
    *named, rest = signature.parameters.values()
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in _INPUTS_OF_BASES]
    function: Any = forward
    function.__signature__ = signature.replace(parameters=[*named, *more, rest])
    return forward


class TrainerContract(nn.Module):
    """Attributes and methods that transformers.Trainer uses, answered by the base.

    Attributes:
        base_model: the base.
    """

    base_model: PreTrainedModel

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
        """True: the Trainer accepts a quantised base only with a trainable adapter on it."""
        return True

    def get_input_embeddings(self) -> nn.Module:
        """The base model's token embedding."""
        embeddings: nn.Module = self.base_model.get_input_embeddings()
        return embeddings

    def _get_name(self) -> str:
        """The base's name: by it the Trainer decides whether a smoothed loss shifts the labels."""
        return self.base_model._get_name()

    def __repr__(self) -> str:
        """The repr of any module, under this class's own name."""
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
        """The number of ranks over which transformers sharded the base's heads; None if not."""
        return self.base_model.tp_size

    # The Trainer divides the number of ranks by this: the ranks of a shard see the same rows.
    _tp_size = tp_size

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base's loss accepts num_items_in_batch, for gradient accumulation."""
        return getattr(self.base_model, "accepts_loss_kwargs", True)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether the backward recomputes activations."""
        return is_checkpointing(self.base_model)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The former name of :attr:`is_activation_checkpointing`, which older Trainers read."""
        return self.is_activation_checkpointing

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recomputes activations in the backward instead of keeping them.

        Args:
            activation_checkpointing_kwargs: arguments of ``torch.utils.checkpoint.checkpoint``.
                With a prefix of keys and values, the next forward refuses the reentrant variant.
            kwargs: further arguments of the base model's method of this name.
        """
        chosen = activation_checkpointing_kwargs or {"use_reentrant": False}
        enable_checkpointing(self.base_model, chosen, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Keeps activations again."""
        disable_checkpointing(self.base_model)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The former name of :meth:`activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The former name of :meth:`activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()
