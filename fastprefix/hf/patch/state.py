"""What patching leaves on a model, and which prefix is active in which thread."""

from __future__ import annotations

import contextlib
import copy
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.utils.hooks import RemovableHandle

from fastprefix.hf.layer.masks import add_patched
from fastprefix.hf.patch.sharding import Sharding
from fastprefix.kv import Group, LayerShape

STATE = "_fastprefix_state"  # on the patched model
HOOKED = "_fastprefix_hooked"  # on it and on all that has a hook which looks for the same state
# The prefix of each `use_prefix` block, by the state's key. Thread-local, so that two threads may
# run one model with different prefixes; not a ContextVar, which torch.compile cannot trace. A
# thread in no block is refused while another's is open: it may have been started for that block.
ACTIVE = threading.local()
WANTING_NONE = "wanting_none"  # there: see `wanting_none`


@contextlib.contextmanager
def wanting_none() -> Iterator[None]:
    """A thread that is in no `use_prefix` block wants no prefix, and is not refused in this one.

    For calls that run a model as it is, whether or not other threads have it patched.
    """
    before = getattr(ACTIVE, WANTING_NONE, False)
    setattr(ACTIVE, WANTING_NONE, True)
    try:
        yield
    finally:
        setattr(ACTIVE, WANTING_NONE, before)


# How a stack of layers (a decoder, an encoder) can be told where its text stands:
# "argument": by position_ids, which follow the attention mask where they are not given;
# "given": by position_ids, for which the model itself knows a default where they are learned;
# "embedding": by what its position embedding is told of the keys that are in the cache;
# "distance": by a bias for each distance, of which it is told that to the prefix (T5);
# "fixed": not at all. "inner": its parts are told; "outer": the language model in it is told.
Placing = Literal["argument", "given", "embedding", "distance", "fixed", "inner", "outer"]


@dataclass
class Keeping:
    """What a model's layers keep of a text beside keys and values; see `cached_state`.

    Attributes:
        stateful: whether they keep anything.
        why_not: why prompts are refused, None where they are not.
        pads: whether padding between a prompt and a text can be skipped.
        stepwise: whether tokens behind a prompt pass the layers' states one by one.
        owners: by name, the modules that go on from a state, and the cache's layers it is in.
        forms: shape without the batch, and dtype, by layer and name.
        cache: of the class that the model makes.
    """

    stateful: bool
    why_not: str | None = None
    pads: bool = False
    stepwise: bool = False
    owners: dict[str, tuple[int, ...]] = field(default_factory=dict)
    forms: dict[tuple[int, str], tuple[torch.Size, torch.dtype]] = field(default_factory=dict)
    cache: Any = None


@dataclass(frozen=True)
class Expanded:
    """How a model that could not be patched takes prefixes through its KV cache.

    Attributes:
        reason: why it could not be patched.
        by_slots: it counts what is in its cache, or in its mask, as positions (alibi), so that a
            prefix takes as many as it has tokens. Else it is told by position_ids.
        pads_free: whether padding on the left of a text leaves its results as they are.
    """

    reason: str
    by_slots: bool
    pads_free: bool


@dataclass
class State:
    """What patching did to a model, so that it can be undone.

    Attributes:
        previous: configs, and the attention implementation to restore in each.
        backend: of the operator.
        lasting: patched by `patch_model`, not just for the blocks that need it.
        blocks: how many blocks rely on the patch at the moment, in all threads.
        running: how many forwards do, of a model that is patched for blocks alone.
        prefixes: how many `use_prefix` blocks with a prefix are open, in all threads.
        opened: all blocks that are open, in the order of opening, with their threads.
        shapes: of the attention layers' keys and values, all ranks' heads.
        query_heads: of these layers, all ranks'.
        groups: which part of the model each layer belongs to.
        sources: which layer's keys and values of the text each layer sees: see
            :class:`fastprefix.hf.patch.probe.Slots`.
        placing: of the stack whose text a prefix moves.
        positions_known: how many positions that stack has learned, None for any.
        counts_padding: whether that stack, bare, gives pads positions.
        frequencies: at which lengths its rotary embeddings change.
        sharding: which heads this rank has of a tensor-parallel model.
        known: what :mod:`fastprefix.hf.checking.check` found of the model; None for not to be
            checked.
        example: what to run the model on to check it; made from the config if None.
        stateful: whether the model says that its layers keep more than keys and values.
        keeping: what they keep, once a prompt was prefilled or used; None before.
        expanded: of a model patched with fallback="expand"; None for all others.
        handles: of the hooks.
        key: names the model in `ACTIVE`.
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
    placing: Placing = "argument"
    positions_known: int | None = None
    counts_padding: bool = True
    frequencies: tuple[tuple[str, int], ...] = ()
    sharding: Sharding | None = None
    known: Any = None
    example: Mapping[str, Any] | None = None
    stateful: bool = False
    keeping: Keeping | None = None
    expanded: Expanded | None = None
    handles: list[RemovableHandle] = field(default_factory=list)
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle holds: see ``__setstate__``."""
        return {**vars(self), "key": "", **_OF_COPIES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Each model that a pickle is read into has a key of its own, as deep copies have."""
        vars(self).update(state, key=uuid.uuid4().hex)
        for config, _ in self.previous:
            add_patched(config)

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
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
