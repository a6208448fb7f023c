"""What patching leaves on a model."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fastprefix.hf.expand.cache import Expanded
from fastprefix.hf.layer.masks import add_patched
from fastprefix.hf.patch.positions import ByPositionIds, Placing
from fastprefix.hf.patch.sharding import Sharding
from fastprefix.hf.states.caches import Keeping
from fastprefix.kv import Group, LayerShape

PATCH = "_fastprefix_state"  # on the patched model: its Patch
HOOKED = "_fastprefix_hooked"  # on it and on all that has a hook which looks for the same Patch


@dataclass
class Patch:
    """What patching found out about a model and did to it, so that it can be undone.

    Attributes:
        previous: configs, and the attention implementation to restore in each.
        backend: of the operator.
        lasting: patched by `patch_model`, not just for the blocks that need it.
        blocks: how many blocks rely on the patch at the moment, in all threads.
        running: how many forwards do, of a model that is patched for blocks alone.
        prefixes: how many `use_prefix` blocks with a prefix are open, in all threads.
        opened: all blocks that are open, in the order of opening, with their threads.
        shapes: key and value shapes of the attention layers, as seen in a forward pass. In a
            tensor-parallel model they count the heads of all ranks, as prefixes do.
        query_heads: how many query heads each attention layer has, all ranks together.
        groups: which part of the model each attention layer belongs to.
        sources: from which layer each layer has the text's keys and values. Itself where it makes
            its own; -1 where it has another layer's keys with other values. Prefixes have keys and
            values for every layer, but PEFT, which puts them in the cache, has them only for those
            that make their own.
        placing: how the stack whose text a prefix moves is told where that text stands.
        is_encoder_decoder: whether the model is one.
        sharding: which heads this rank has of a tensor-parallel model; None for any other model.
        known: what :mod:`fastprefix.hf.checking` found of the model; None for not to be checked.
        example: what to run the model on to check it; made from the config if None.
        stateful: whether the model says that its layers keep more than keys and values.
        keeping: what they keep, once a prompt was prefilled or used; None before.
        expanded: how a model with fallback="expand" takes its prefixes; None for all others.
        handles: of the hooks.
        key: names the model in :data:`fastprefix.hf.patch.threads.ACTIVE`.
    """

    previous: list[tuple[Any, str | None]]
    backend: str
    lasting: bool = False
    blocks: int = 0
    running: int = 0
    prefixes: int = 0
    opened: tuple[tuple[int, Any], ...] = ()
    shapes: tuple[LayerShape, ...] = ()
    query_heads: tuple[int, ...] = ()
    groups: tuple[Group, ...] = ()
    sources: tuple[int, ...] = ()
    placing: Placing = field(default_factory=ByPositionIds)
    is_encoder_decoder: bool = False
    sharding: Sharding | None = None
    known: Any = None
    example: Mapping[str, Any] | None = None
    stateful: bool = False
    keeping: Keeping | None = None
    expanded: Expanded | None = None
    handles: list[RemovableHandle] = field(default_factory=list)
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def default_offset(self, num_virtual_tokens: int) -> int:
        """By how many positions a learned prefix moves the text.

        As PEFT does it, which puts prefixes in the cache: by the prefix's length in decoder-only
        models and in encoders that count cached keys as text (BERT, RoBERTa, ELECTRA); else by 0.
        PEFT moves the text of some encoder-decoders' decoders too (BART), which here takes an
        explicit offset.
        """
        moves = self.placing.moves_by_default and not self.is_encoder_decoder
        return num_virtual_tokens if moves else 0

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle holds: see ``__setstate__``."""
        return {**vars(self), "key": "", **_OF_COPIES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Each model that a pickle is read into has a key of its own, as deep copies have."""
        vars(self).update(state, key=uuid.uuid4().hex)
        for config, _ in self.previous:
            add_patched(config)

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        """A copied model is patched for good, and sees none of the original's prefixes."""
        own = {n: copy.deepcopy(getattr(self, n), memo) for n in ("previous", "known", "handles")}
        for config, _ in own["previous"]:
            add_patched(config)
        return replace(self, **own, key=uuid.uuid4().hex, **_OF_COPIES)


# A copy is patched for good, since no block of its own will restore it.
_OF_COPIES: dict[str, Any] = {
    "lasting": True,
    "blocks": 0,
    "running": 0,
    "prefixes": 0,
    "opened": (),
}


def is_patched(model: PreTrainedModel) -> bool:
    """Whether :func:`fastprefix.patch_model` holds for a model."""
    return getattr(model, PATCH, None) is not None


def patch_of(model: PreTrainedModel) -> Patch:
    """What patching found out about a model.

    Raises:
        ValueError: it is not patched.
    """
    patch = getattr(model, PATCH, None)
    if patch is None:
        raise ValueError(f"model: this {type(model).__name__} is not patched; call patch_model")
    return patch
