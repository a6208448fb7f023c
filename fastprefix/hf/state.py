"""What patching leaves on a model, and which prefix is active in which thread."""

from __future__ import annotations

import copy
import threading
import uuid
from dataclasses import dataclass, field
from typing import Any

from torch.utils.hooks import RemovableHandle

from fastprefix.hf.sharding import Sharding
from fastprefix.kv import LayerShape

STATE = "_fastprefix_state"  # on the patched model
HOOKED = "_fastprefix_hooked"  # on it and on its decoder: the same state, for the hook
# The prefix of each `use_prefix` block, by the state's key. Thread-local, so that two threads may
# run one model with different prefixes; not a ContextVar, which torch.compile cannot trace.
ACTIVE = threading.local()


@dataclass
class State:
    """What patching did to a model, so that it can be undone.

    Attributes:
        previous: the attention implementation to restore.
        backend: of the operator.
        lasting: patched by `patch_model`, not just for the blocks that need it.
        blocks: how many blocks rely on the patch at the moment, in all threads.
        shapes: of the attention layers' keys and values, all ranks' heads.
        sharding: which heads this rank has of a tensor-parallel model.
        handles: of the hooks.
        key: names the model in `ACTIVE`.
    """

    previous: str | None
    backend: str
    lasting: bool = False
    blocks: int = 0
    shapes: tuple[LayerShape, ...] = ()
    sharding: Sharding | None = None
    handles: list[RemovableHandle] = field(default_factory=list)
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        """A copied model is patched for good, and sees none of the original's prefixes."""
        handles = copy.deepcopy(self.handles, memo)
        return State(self.previous, self.backend, True, 0, self.shapes, self.sharding, handles)
