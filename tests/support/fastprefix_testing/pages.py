"""The blocks of code of README.md and docs/*.md, and what a page says about them.

A comment on the line before a block marks it:

    <!-- not run: WHY -->   nothing runs it; tests/docs/test_snippets.py lists how many there are
    <!-- PEFT -->           PEFT's side of a comparison: runs where the installed PEFT can
    <!-- fastprefix -->     our side of it: left out where PEFT's runs

A block of `text` with nothing but empty lines between it and a block of code is what that code
prints. "..." in it stands for anything, as in doctest.
"""

from __future__ import annotations

import re
from pathlib import Path

from fastprefix_testing.session import Block

ROOT = Path(__file__).parents[3]

FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?"
    r"^```(?P<language>python|bash)\n(?P<code>.*?)^```$"
    r"(?:\s*?^```text\n(?P<shown>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
PEFT, OURS = "PEFT", "fastprefix"
NOT_RUN = "not run: "


def pages() -> dict[str, Path]:
    """The pages by their names, README first; not the reports of experiments."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path for path in found}


def blocks(path: Path) -> list[Block]:
    """The blocks of a page that are Python, or a shell's with commands of fastprefix.

    Raises:
        ValueError: a mark that nobody knows.
    """
    text = path.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        mark, code = match["mark"] or "", match["code"]
        if match["language"] == "bash" and not re.search("^fastprefix ", code, re.MULTILINE):
            continue  # what installs something, or is of make
        line = text[: match.start("code")].count("\n") + 1
        if mark not in ("", PEFT, OURS) and not mark.startswith(NOT_RUN):
            raise ValueError(f"{path.name}, line {line - 2}: nobody knows the mark {mark!r}")
        found.append(Block(match["language"], code, line, mark, match["shown"]))
    return found
