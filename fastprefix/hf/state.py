"""What patching leaves on a model, and which prefix is active in which thread."""

from __future__ import annotations

import copy
import threading
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.utils.hooks import RemovableHandle

from fastprefix.kv import Group, LayerShape

STATE = "_fastprefix_state"  # on the patched model
HOOKED = "_fastprefix_hooked"  # on it and on all that has a hook which looks for the same state
# The prefix of each `use_prefix` block, by the state's key. Thread-local, so that two threads may
# run one model with different prefixes; not a ContextVar, which torch.compile cannot trace.
ACTIVE = threading.local()

# How a stack of layers (a decoder, an encoder) can be told where its text stands:
# "argument": by position_ids, which follow the attention mask where they are not given;
# "given": by position_ids, for which only the model itself knows a default;
# "embedding": by what its position embedding is told of the keys that are in the cache;
# "fixed": not at all. "inner": its parts are told.
Placing = Literal["argument", "given", "embedding", "fixed", "inner"]


@dataclass
class State:
    """What patching did to a model, so that it can be undone.

    Attributes:
        previous: configs, and the attention implementation to restore in each.
        backend: of the operator.
        lasting: patched by `patch_model`, not just for the blocks that need it.
        blocks: how many blocks rely on the patch at the moment, in all threads.
        shapes: of the attention layers' keys and values.
        groups: which part of the model each layer belongs to.
        placing: of the stack whose text a prefix moves.
        handles: of the hooks.
        key: names the model in `ACTIVE`.
    """

    previous: list[tuple[Any, str | None]]
    backend: str
    lasting: bool = False
    blocks: int = 0
    shapes: tuple[LayerShape, ...] = ()
    groups: tuple[Group, ...] = ()
    placing: Placing = "argument"
    handles: list[RemovableHandle] = field(default_factory=list)
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        """A copied model is patched for good, and sees none of the original's prefixes."""
        return State(
            copy.deepcopy(self.previous, memo),
            self.backend,
            True,
            0,
            self.shapes,
            self.groups,
            self.placing,
            copy.deepcopy(self.handles, memo),
        )
