"""A model made ready for a method: what is trained, how it generates, what it would ship."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.tuning import (
    PrefixConfig,
    PrefixTuningModel,
    PromptConfig,
    PromptTuningModel,
    count_parameters,
)

from .plan import Method

# The head that classifiers of transformers start from random numbers, and every method trains.
HEAD = "classifier"
# By model type: where LoRA goes (Hu et al. 2021: queries and values), and the output of each
# feed-forward block, after which bottlenecks stand (Pfeiffer et al. 2021).
LORA_TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
FEED_FORWARD = {"llama": ".mlp", "bert": ".output.dense"}


@dataclass(frozen=True)
class Built:
    """A model in which exactly what the method trains requires a gradient.

    Attributes:
        model: for ``transformers.Trainer``.
        trainable: numbers that are trained, the classifier's head included.
        stored: numbers that must be stored for the task.
        save: writes what must be stored into a folder.
        infix: whether the forward wants ``infix_positions``.
    """

    model: nn.Module
    trainable: int
    stored: int
    save: Callable[[Path], object]
    infix: bool = False

    def bytes_on_disk(self) -> int:
        """Of the files that the task needs beside the base."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder))
            return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())


class Bottleneck(nn.Module):
    """h + up(gelu(down(h))), the identity at the start (Houlsby et al. 2019, section 2.1)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(size, width), nn.Linear(width, size)
        nn.init.normal_(self.down.weight, std=1e-2)
        nn.init.zeros_(self.up.weight)
        for layer in (self.down, self.up):
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """The same shape, [..., size]."""
        return hidden + self.up(nn.functional.gelu(self.down(hidden)))


def build(
    method: Method,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task_type: str,
) -> Built:
    """Prepares a fresh model.

    Args:
        method: what to train.
        model: the base; it is changed, and belongs to the result.
        tokenizer: the base's.
        task_type: PEFT's name, "CAUSAL_LM" or "SEQ_CLS".

    Raises:
        ValueError: the method does not go with the model: BitFit where there are no biases, a
            head alone where there is none, an architecture that LORA_TARGETS does not know.
    """
    if method.kind == "prefix":
        config = PrefixConfig(task_type=task_type, **method.options)
        return _ours(PrefixTuningModel(model, config, tokenizer))
    if method.kind == "prompt":
        prompt = PromptConfig(task_type=task_type, **method.options)
        return _ours(PromptTuningModel(model, prompt, tokenizer), prompt.placement == "infix")
    if method.kind == "lora":
        return _lora(method, model, task_type)
    if method.kind == "bottleneck":
        model.requires_grad_(False)
        _add_bottlenecks(model, **method.options)
        _thaw(model, lambda name: "bottleneck" in name or HEAD in name)
    elif method.kind == "bitfit":
        if not any(
            name.endswith("bias") and HEAD not in name for name, _ in model.named_parameters()
        ):
            raise ValueError(f"bitfit: {type(model).__name__} has no biases")
        _thaw(model, lambda name: name.endswith("bias") or HEAD in name)
    elif method.kind == "head":
        if not any(HEAD in name for name, _ in model.named_parameters()):
            raise ValueError(f"head: {type(model).__name__} has none")
        _thaw(model, lambda name: HEAD in name)
    else:
        _thaw(model, lambda name: method.kind == "full")
    return _in_place(model)


def _ours(tuned: Any, infix: bool = False) -> Built:
    count = count_parameters(tuned)
    heads = sum(tensor.numel() for tensor in tuned.heads().values())
    return Built(tuned, count.trainable, count.exported + heads, tuned.save_pretrained, infix)


def _lora(method: Method, model: PreTrainedModel, task_type: str) -> Built:
    from peft import LoraConfig, get_peft_model

    kind = model.config.model_type
    if kind not in LORA_TARGETS:
        raise ValueError(f"lora: got the model type {kind!r}, takes one of {list(LORA_TARGETS)}")
    rank = method.options["r"]
    config = LoraConfig(
        task_type=task_type, r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS[kind]
    )
    tuned: Any = get_peft_model(model, config)
    size = _trainable(tuned)
    return Built(tuned, size, size, tuned.save_pretrained)


def _add_bottlenecks(model: PreTrainedModel, width: int) -> None:
    kind = model.config.model_type
    if kind not in FEED_FORWARD:
        raise ValueError(f"bottleneck: got {kind!r}, takes one of {list(FEED_FORWARD)}")
    places = [
        module
        for name, module in model.named_modules()
        if name.endswith(FEED_FORWARD[kind]) and "attention" not in name
    ]
    for place in places:
        place.bottleneck = Bottleneck(model.config.hidden_size, width).to(model.device)
        place.register_forward_hook(lambda module, _, output: module.bottleneck(output))


def _thaw(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _in_place(model: PreTrainedModel) -> Built:
    def save(folder: Path) -> None:
        tensors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        if tensors:
            save_file(tensors, folder / "trained.safetensors")

    size = _trainable(model)
    return Built(model, size, size, save)
