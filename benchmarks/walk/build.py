"""A small model of any class, whose weights are loud enough that a check on it can fail."""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from walk.classes import Entry
from walk.shrink import TEXT, small

IS_DECODER = ("bert", "roberta", "electra", "camembert", "ernie", "rembert", "xmod", "roc_bert",
              "big_bird", "roformer", "megatron-bert", "data2vec-text", "xlm-roberta",
              "xlm-roberta-xl", "roberta-prelayernorm", "bert-generation", "reformer")  # fmt: skip


class CannotBuildError(Exception):
    """No small model of the class could be made, or it does not run; the message says why."""


def build(entry: Entry, seed: int = 0, **changes: Any) -> Any:
    """A model in eval mode, float32; the same arguments give the same weights.

    Raises:
        CannotBuildError: it could not be made, or does not run on a text.
    """
    try:
        model_class = entry.load()
        config_class = model_class.config_class
        if entry.task == "causal" and entry.model_type in IS_DECODER:
            changes = {"is_decoder": True, **changes}
        config = small(config_class, **changes)
    except Exception as problem:
        raise CannotBuildError(f"its configuration: {first_line(problem)}") from problem
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = model_class(config).float().eval()
            make_loud(model)
        except Exception as problem:
            raise CannotBuildError(f"the model: {first_line(problem)}") from problem
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > 20_000_000:
        raise CannotBuildError(f"it has {size:,} weights however small its known fields are")
    if getattr(model, "generation_config", None) is not None:
        chosen = model.generation_config
        chosen.eos_token_id = chosen.forced_eos_token_id = chosen.forced_bos_token_id = None
        chosen.pad_token_id = 0
        if takes(model, "decoder_input_ids") and chosen.decoder_start_token_id is None:
            chosen.decoder_start_token_id = model.config.decoder_start_token_id = 1
        chosen.suppress_tokens = chosen.begin_suppress_tokens = None
    model._walk_plain = True  # see walk.oracle
    return model


@torch.no_grad()
def check_runs(model: Any, inputs: dict[str, Any]) -> None:
    """Whether the plain model runs at all.

    Raises:
        CannotBuildError: it does not.
    """
    try:
        copy.deepcopy(model)(**inputs)
    except Exception as problem:
        raise CannotBuildError(f"run as it is: {first_line(problem)}") from problem


def in_double(model: Any) -> Any:
    """A copy in float64, whose experts run one by one: their grouped kernels know no float64."""
    model = copy.deepcopy(model).double()
    if hasattr(model, "set_experts_implementation"):
        with contextlib.suppress(Exception):
            model.set_experts_implementation("eager")
    return model


def make_loud(model: nn.Module, std: float = 0.2) -> None:
    """Weights large enough to matter; biases and norms off their 0 and 1: a lost one would show."""
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() <= 1:
            centre = parameter.float().mean().item()
            centre = centre if centre == centre and abs(centre) < 1e3 else 0.0
            nn.init.normal_(parameter, centre, 0.1)
        else:
            nn.init.normal_(parameter, 0.0, std)


def text(rows: int, length: int, seed: int) -> Tensor:
    """Ids of ordinary tokens."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randint(*TEXT, (rows, length), generator=generator)


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward has a parameter of this name."""
    return name in inspect.signature(model.forward).parameters


def first_line(problem: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    text_ = " ".join(lines[:3]) if lines else ""
    return f"{type(problem).__name__}: {text_}"[:300]
