"""How the sub-commands print: results on standard output, everything else on standard error.

Where standard error is not a terminal, progress is a few plain lines without control characters.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console()  # results
messages = Console(stderr=True)

_LINES = 10  # at most, for one piece of work, if there is no terminal


def quiet_libraries() -> None:
    """Silences messages of libraries that do not help the user; call it before any import."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not _is_terminal():
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    if not _is_terminal():
        transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="peft|torch|transformers")


def tell(line: str) -> None:
    """Prints one line on standard error."""
    sys.stdout.flush()  # so that a terminal shows both streams in the order of writing
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Names the work in progress: with a spinner on a terminal, else on one line."""
    if not _is_terminal():
        tell(what)
        yield
        return
    with messages.status(escape(what)):
        yield


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar on a terminal, at most ten lines elsewhere; whatever ends the block ends it too.

    Args:
        what: is done.
        total: steps.

    Returns:
        What to call with the number of steps done so far, and a note on them.
    """
    if not _is_terminal():
        every = -(-total // _LINES)

        def line(done: int, note: str) -> None:
            if done % every == 0 or done == total:
                tell(f"{what}: {done} of {total}" + (f", {note}" if note else ""))

        yield line
        return
    columns = (
        *(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("{task.fields[note]}", markup=False), TimeRemainingColumn()),
    )
    with Progress(*columns, console=messages) as shown:
        bar = shown.add_task(what, total=total, note="")
        yield lambda done, note: shown.update(bar, completed=done, note=note)


def _is_terminal() -> bool:
    return messages.is_terminal and not messages.is_dumb_terminal
