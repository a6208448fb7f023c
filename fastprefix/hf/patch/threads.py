"""Which prefix is active in which thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastprefix.hf.devices import is_replica
from fastprefix.hf.patch.patch import Patch

# The active prefix of the innermost `use_prefix` block, by the key of the model's Patch.
# Thread-local, so that two threads may run one model with different prefixes. Not a ContextVar,
# because torch.compile cannot trace those. A thread without a block is refused while another thread
# has one: it may have been started for that block.
ACTIVE = threading.local()
_WANTING_NONE = "wanting_none"  # there: see `wanting_none`


@contextlib.contextmanager
def wanting_none() -> Iterator[None]:
    """In this block the thread may run models without a prefix while other threads use one.

    It is for calls that run a model as it is, whether or not other threads have patched it.
    """
    before = getattr(ACTIVE, _WANTING_NONE, False)
    setattr(ACTIVE, _WANTING_NONE, True)
    try:
        yield
    finally:
        setattr(ACTIVE, _WANTING_NONE, before)


def active_of(module: nn.Module, given: Any, patch: Patch) -> Any:
    """The prefix of a call: the one given as an argument, or that of its thread; None for none.

    Raises:
        RuntimeError: this thread has none, and another has a use_prefix block open.
    """
    active = getattr(ACTIVE, patch.key, None) if given is None else given
    if active is None and patch.opened and is_replica(module):
        # nn.DataParallel runs a replica in its own thread, on behalf of the thread that called.
        # Which one that is, is clear only if a single thread has blocks open.
        threads = {thread for thread, _ in patch.opened}
        active = patch.opened[-1][1] if len(threads) == 1 else None
    if active is None and patch.prefixes and not getattr(ACTIVE, _WANTING_NONE, False):
        raise RuntimeError(
            f"{type(module).__name__}: a use_prefix block is open in another thread and none "
            "in this one, which would run without its prefix; open one here as well: "
            "use_prefix(model, kv), or use_prefix(model, None) for no prefix"
        )
    return active
