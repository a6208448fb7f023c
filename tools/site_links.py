"""Lets pages of docs/ link to the rest of the repository, on the site as on a code host.

mkdocs knows the files of docs/ only. Links that lead out of it (``../benchmarks/results/a.png``)
are rewritten while the site is built:

- what lies in ``benchmarks/results`` becomes part of the site, at the same path;
- any other file or folder becomes a link to ``repo_url`` of mkdocs.yml. Without one its text
  stays, which names the path.

A link to what does not exist is left alone, and mkdocs reports it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
WITHIN = "benchmarks/results"
LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>[^\]\n]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)"
)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pictures and the reports of the benchmarks."""
    for path in sorted((ROOT / WITHIN).iterdir()):
        if path.suffix in (".md", ".png"):
            name = f"{WITHIN}/{path.name}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrites the links of a page that leave docs/."""
    here = posixpath.dirname(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        target, anchor = match["target"], match["anchor"] or ""
        found = posixpath.normpath(posixpath.join("docs", here, target))
        if not target.startswith("../") or found.split("/")[0] in ("docs", ".."):
            return match[0]
        text = f"{match['image']}[{match['text']}]"
        if files.get_file_from_path(found) is not None:
            return f"{text}({posixpath.relpath(found, here or '.')}{anchor})"
        if not (ROOT / found).exists():
            return match[0]
        if not config.repo_url:
            return match["text"]
        return f"{text}({config.repo_url.rstrip('/')}/blob/main/{found}{anchor})"

    return LINK.sub(rewritten, markdown)
