"""The wrapper of a frozen base: PEFT's methods, the base's attributes, ``state_dict()``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

from fastprefix.arguments import check_type, methods_refuse_unknown_arguments
from fastprefix.hf import pipelines
from fastprefix.tuning.checkpoint import described, hold_only_what_is_trained
from fastprefix.tuning.configs.tuning_config import TuningConfig
from fastprefix.tuning.hub import push
from fastprefix.tuning.misspelt import forward_inputs
from fastprefix.tuning.model_card import CardContent, write_card
from fastprefix.tuning.peft_base import freeze
from fastprefix.tuning.trainer_contract import TrainerContract

# Methods of the base that would run or save it without what is trained here.
_BASE_ONLY = (
    "continuous_batching_context_manager",
    "from_pretrained",
    "generate_batch",
    "init_continuous_batching",
    "save_pretrained",
)


@methods_refuse_unknown_arguments
class TunedModel(TrainerContract):
    """A frozen base, and encoders that are trained in front of it.

    An attribute that this class lacks is looked up in the base, as in PEFT's PeftModel.

    ``state_dict()`` holds the encoders, their heads and what is trained inside the base. The frozen
    weights are not in it. An entry "_extra_state" holds the configurations. So a trainer's
    checkpoint is small, and it is all that ``from_pretrained`` needs.

    Args:
        model: the base. Its parameters are frozen, except those of PEFT's adapters inside it.

    Attributes:
        base_model: the base.
        config_class: the class of its configurations.
    """

    config_class: ClassVar[type[TuningConfig]]

    def __init__(self, model: PreTrainedModel) -> None:
        check_type("model", model, PreTrainedModel, "a transformers PreTrainedModel")
        super().__init__()
        freeze(model)
        pipelines.accept(type(self).__name__)
        self.base_model = model
        self._inputs = forward_inputs(model, inspect.signature(type(self).forward).parameters)
        hold_only_what_is_trained(self)

    def get_base_model(self) -> PreTrainedModel:
        """The base, without what is trained in front of it."""
        return self.base_model

    def __getattr__(self, name: str) -> Any:
        """Looks up in the base an attribute that this class lacks.

        Two kinds of attributes are not looked up. A private one that no class of the base declares
        was set on that one object (accelerate's hooks, torch.compile's original). And a method
        that saves only the base, runs only the base, or switches a LoRA inside it would ignore what
        is trained here.

        Raises:
            AttributeError: the base lacks it too, or it is one of these two kinds.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # a copy that is being made has none yet
                raise
            private = name.startswith("_")
            if private and (name.startswith("__") or not hasattr(type(self.base_model), name)):
                raise
        if name in _BASE_ONLY or (not private and hasattr(PeftAdapterMixin, name)):
            raise AttributeError(
                f"{type(self).__name__} has no {name}; the base model's, which leaves out what is "
                f"trained here, is base_model.{name}"
            )
        return getattr(self.base_model, name)

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

        If the repository has a model card, its text stays.

        Args:
            repo_id: the repository; created if it does not exist.
            commit_message: "Upload adapter" if None.
            commit_description: the description of the commit.
            private: whether a repository that is created is private; its owner's default if None.
            token: the hub's access token; the one stored on this machine if None.
            revision: the branch, created if it does not exist; "main" if None.
            create_pr: whether to open a pull request instead of committing.
            tags: additional tags of the card.
            safe_serialization: see :meth:`save_pretrained`.
            selected_adapters: see :meth:`save_pretrained`.

        Returns:
            What ``huggingface_hub.HfApi.upload_folder`` returns: information on the commit.

        Raises:
            ValueError: see :meth:`save_pretrained`.
        """
        saved = {"safe_serialization": safe_serialization, "selected_adapters": selected_adapters}
        return push(
            lambda folder: self.save_pretrained(folder, **saved),
            repo_id,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tags=tags,
        )

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Writes README.md, the model card. If there is one, only its metadata is completed.

        Args:
            output_dir: an existing folder.
        """
        configs, active = self.peft_config, self.active_adapter
        content = CardContent(type(self).__name__, self.base_model, configs, active)
        write_card(content, Path(output_dir))

    def get_extra_state(self) -> Tensor:
        """The configurations, as an entry of ``state_dict()``."""
        names = list(self.peft_config)
        configs = {name: self._present_config(name) for name in names}
        return described(self.config_class.model_class, configs, self.active_adapter)

    def _present_config(self, adapter_name: str) -> Any:
        """The configuration that describes an adapter's present parameters."""
        return self.peft_config[adapter_name]

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: the adapters must exist before their parameters are loaded."""

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Counts the trainable parameters, and all parameters, those of the base included."""
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
