"""How a stack of layers can be told that its text stands behind a prefix."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from fastprefix.hf.patch.probe import takes
from fastprefix.hf.patch.state import Placing
from fastprefix.hf.versions import cached_name


def placing_of(model: PreTrainedModel, *, causal: bool) -> Placing:
    """How a model that is one stack learns where its text stands."""
    by_argument = takes(model, "position_ids")
    embeddings = position_embeddings(model)
    if causal and by_argument and not _counts_itself(model):
        return "argument"
    if embeddings:
        return "embedding"
    return "given" if by_argument else "fixed"


def _counts_itself(stack: nn.Module) -> bool:
    """Whether a stack counts positions from another number than 0, as it alone knows (RoBERTa)."""
    return any(hasattr(x, "create_position_ids_from_input_ids") for x in stack.modules())


def position_embeddings(stack: nn.Module) -> list[nn.Module]:
    """The modules that place a text behind the keys that are in the cache."""
    return [module for module in stack.modules() if cached_name(module) is not None]
