"""Runs the blocks of a page as though they were pasted into one session, one after the other.

    python -m fastprefix_testing.session BLOCKS.json PRINTED.json

It needs Python alone, so that an environment without pytest can run it.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Block(NamedTuple):
    """One block: `line` is the first of its code in the page, `shown` what it should print."""

    language: str  # python or bash
    code: str
    line: int
    mark: str
    shown: str | None


def run_blocks(page: str, blocks: Iterable[Block]) -> list[str]:
    """What each block prints. A traceback has the page's lines; a failing command raises.

    Raises:
        RuntimeError: a command failed; the message has what it printed.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for block in blocks:
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.code, page, "exec")
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, namespace)
            printed.append(output.getvalue())
        else:
            done = subprocess.run(["bash", "-euc", block.code], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(
                    f"{page}, line {block.line}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
                )
            printed.append(done.stdout)
    return printed


if __name__ == "__main__":
    page, *found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    printed = run_blocks(page, [Block(*block) for block in found])
    Path(sys.argv[2]).write_text(json.dumps(printed), encoding="utf-8")
