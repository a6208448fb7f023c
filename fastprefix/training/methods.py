"""The ways to train: what each one trains in a base model, and what it stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.training.base_models import load_for
from fastprefix.training.config import MethodName
from fastprefix.tuning import PrefixConfig, PrefixTuningModel, PromptConfig, PromptTuningModel
from fastprefix.tuning.find_heads import find_heads

# What "head" and "bitfit" store: the parameters that they train, by the names of the base.
TRAINED_FILE = "trained.safetensors"


@dataclass(frozen=True)
class Trained:
    """A model in which exactly what a method trains requires a gradient.

    Attributes:
        model: for a Trainer.
        save: writes what must be stored for the task into a folder.
    """

    model: nn.Module
    save: Callable[[Path], object]

    @property
    def trainable(self) -> int:
        """Numbers that are trained, a classifier's head included."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def total(self) -> int:
        """All numbers, those of the base included."""
        return sum(p.numel() for p in self.model.parameters())


def build(
    method: MethodName,
    options: Mapping[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task_type: str,
) -> Trained:
    """Prepares a base model for a method.

    Args:
        method: what to train.
        options: of the method's configuration.
        model: the base; it is changed, and belongs to the result.
        tokenizer: the base's.
        task_type: PEFT's name of what the model does.

    Raises:
        ValueError: an option does not fit, or the model has nothing that the method would train.
        ImportError: "lora" without a PEFT that runs with the installed transformers.
    """
    if method == "prefix":
        return _own(PrefixTuningModel(model, _config(PrefixConfig, options, task_type), tokenizer))
    if method == "prompt":
        config = _config(PromptConfig, options, task_type)
        if config.placement == "infix":
            raise ValueError("options.placement: got infix, which no run trains; takes prefix")
        return _own(PromptTuningModel(model, config, tokenizer))
    if method == "lora":
        return _lora(model, options, task_type)
    chosen = _chosen(method, model, task_type)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
    if method == "full":
        return Trained(model, model.save_pretrained)
    return Trained(model, lambda folder: _save_trained(model, folder))


def load_trained(
    method: MethodName,
    folder: Path,
    name: str,
    task_type: str,
    dtype: Any,
    labels: tuple[str, ...] = (),
) -> nn.Module:
    """A model with what :attr:`Trained.save` stored, for inference.

    Args:
        method: that trained it.
        folder: where it was stored.
        name: of the base.
        task_type: PEFT's name of what the model does.
        dtype: of the weights.
        labels: names of the classes, for SEQ_CLS.

    Raises:
        OSError: a file is missing.
        ValueError: what is stored does not fit the base.
    """
    if method == "full":
        return load_for(str(folder), task_type, dtype, labels).eval()
    model: Any = load_for(name, task_type, dtype, labels)
    if method == "prefix":
        return PrefixTuningModel.from_pretrained(model, folder).eval()
    if method == "prompt":
        return PromptTuningModel.from_pretrained(model, folder).eval()
    if method == "lora":
        return _peft().PeftModel.from_pretrained(model, str(folder)).eval()
    if method != "none":
        stored = load_file(folder / TRAINED_FILE)
        known = dict(model.named_parameters())
        for key, tensor in stored.items():
            if key not in known or known[key].shape != tensor.shape:
                raise ValueError(f"{folder}: holds {key} {list(tensor.shape)}, {name} does not")
            known[key].data.copy_(tensor)
    return model.eval()


def _own(tuned: PrefixTuningModel | PromptTuningModel) -> Trained:
    return Trained(tuned, tuned.save_pretrained)


def _config(kind: Any, options: Mapping[str, Any], task_type: str) -> Any:
    """A method's configuration, whose errors name the options."""
    if "task_type" in options:
        raise ValueError("options.task_type: got it, takes the run's task_type")
    try:
        return kind(task_type=task_type, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"options: {error}") from error


def _lora(model: PreTrainedModel, options: Mapping[str, Any], task_type: str) -> Trained:
    peft = _peft()
    tuned = peft.get_peft_model(model, _config(peft.LoraConfig, options, task_type))
    return Trained(tuned, tuned.save_pretrained)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"method: lora needs a PEFT that runs here ({error})") from error
    return peft


def _chosen(method: MethodName, model: PreTrainedModel, task_type: str) -> Callable[[str], bool]:
    """Which of the base's parameters a method trains, by their names."""
    heads = tuple(f"{head}." for head in find_heads(model, None, task_type))
    names = [name for name, _ in model.named_parameters()]
    if method == "head" and not heads:
        raise ValueError(f"method: got head, but {type(model).__name__} has none for {task_type}")
    biases = {name for name in names if name.endswith("bias") and not name.startswith(heads)}
    if method == "bitfit" and not biases:
        raise ValueError(f"method: got bitfit, but {type(model).__name__} has no biases")
    return {
        "full": lambda name: True,
        "head": lambda name: name.startswith(heads),
        "bitfit": lambda name: name in biases or (bool(heads) and name.startswith(heads)),
    }.get(method, lambda name: False)


def _save_trained(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file(tensors, folder / TRAINED_FILE)
