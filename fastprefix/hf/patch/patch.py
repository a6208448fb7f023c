"""What patching leaves on a model."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fastprefix.arguments import refuses_unknown_arguments
from fastprefix.hf.expand.cache import Expanded
from fastprefix.hf.layer.masks import add_patched
from fastprefix.hf.patch.positions import ByPositionIds, Placing
from fastprefix.hf.patch.sharding import Sharding
from fastprefix.hf.states.caches import Keeping
from fastprefix.kv import Group, LayerShape

PATCH = "_fastprefix_state"  # on the patched model: its Patch
HOOKED = "_fastprefix_hooked"  # on every module with a hook that needs the model's Patch


@dataclass
class Patch:
    """What patching found out about a model and did to it, so that it can be undone.

    Attributes:
        previous: configs, and the attention implementation to restore in each.
        backend: the backend argument of the operator.
        lasting: whether `patch_model` patched the model. Otherwise the last block that needs the
            patch restores the model.
        blocks: how many open blocks need the patch, in all threads.
        counting: whether running forwards are counted: for a patch that is not lasting.
        running: how many running forwards need it.
        prefixes: how many `use_prefix` blocks with a prefix are open, in all threads.
        opened: the open blocks in the order of opening: thread and active prefix of each.
        shapes: key and value shapes of the attention layers, as seen in a forward pass. In a
            tensor-parallel model they count the heads of all ranks, as prefixes do.
        query_heads: how many query heads each attention layer has, all ranks together.
        groups: which part of the model each attention layer belongs to.
        sources: for each layer, the layer whose keys and values of the text it uses. This is the
            layer itself if it makes its own, and -1 if it uses another layer's keys with other
            values. Our prefixes have keys and values for every layer. PEFT puts prefixes into the
            cache, so it has them only for layers that make their own.
        own_use: whether the model uses causal masks itself, or may do so. Layers then get masks of
            every query and key.
        placing: how to tell the stack that attends to the prefix where its text stands.
        is_encoder_decoder: whether the model is an encoder-decoder.
        sharding: which heads this rank has in a tensor-parallel model; None for any other model.
        known: what :mod:`fastprefix.hf.checking` found out; None if the model is not to be checked.
        example: inputs for checks of the model; made from its config if None.
        stateful: whether the model says that its layers keep more than keys and values.
        keeping: what they keep; None until a prompt is prefilled or used.
        expanded: how a model with fallback="expand" gets its prefixes; None for all others.
        handles: the handles of all hooks.
        key: name of the model in :data:`fastprefix.hf.patch.threads.ACTIVE`.
    """

    previous: list[tuple[Any, str | None]]
    backend: str
    lasting: bool = False
    blocks: int = 0
    counting: bool = False
    running: int = 0
    prefixes: int = 0
    opened: tuple[tuple[int, Any], ...] = ()
    shapes: tuple[LayerShape, ...] = ()
    query_heads: tuple[int, ...] = ()
    groups: tuple[Group, ...] = ()
    sources: tuple[int, ...] = ()
    own_use: bool = True
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
        """By how many positions a learned prefix moves the text, unless the user says otherwise.

        The text moves by the prefix's length in decoder-only models, and in encoders that count
        cached keys as text (BERT, RoBERTa, ELECTRA). Otherwise it does not move. This follows PEFT,
        which puts prefixes into the cache. One difference: PEFT also moves the text of some
        decoders of encoder-decoders (BART). Here that needs an explicit offset.
        """
        moves = self.placing.moves_by_default and not self.is_encoder_decoder
        return num_virtual_tokens if moves else 0

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle contains; see ``__setstate__``."""
        return {**vars(self), "key": "", **_OF_COPIES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Gives each model that is read from a pickle a key of its own, as for deep copies."""
        vars(self).update(state, key=uuid.uuid4().hex)
        for config, _ in self.previous:
            add_patched(config, self.own_use)

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        """The Patch of a copied model: lasting, and without the original's prefixes."""
        own = {n: copy.deepcopy(getattr(self, n), memo) for n in ("previous", "known", "handles")}
        for config, _ in own["previous"]:
            add_patched(config, self.own_use)
        return replace(self, **own, key=uuid.uuid4().hex, **_OF_COPIES)


# The patch of a copy is lasting, since no block of its own will restore it.
_OF_COPIES: dict[str, Any] = {
    "lasting": True,
    "blocks": 0,
    "running": 0,
    "prefixes": 0,
    "opened": (),
}


@refuses_unknown_arguments
def is_patched(model: PreTrainedModel) -> bool:
    """Whether :func:`fastprefix.patch_model` holds for a model."""
    return getattr(model, PATCH, None) is not None


@refuses_unknown_arguments
def patch_of(model: PreTrainedModel) -> Patch:
    """The Patch of a model.

    Raises:
        ValueError: it is not patched.
    """
    patch: Patch | None = getattr(model, PATCH, None)
    if patch is None:
        raise ValueError(f"model: this {type(model).__name__} is not patched; call patch_model")
    return patch
