"""WebNLG's entries by category: some to train with, the others as categories that are never seen.

    python experiments/webnlg_categories.py data/webnlg/dev.json data/webnlg

Writes train.json and seen.json (the same categories, different entries: a fifth of them) and
unseen.json, in the format of the data set, which the task ``webnlg`` reads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Three of ten categories: people, places and organisations that differ from the other seven.
UNSEEN = ("Astronaut", "University", "Monument")


def is_held_out(entry: Mapping[str, Any]) -> bool:
    """A fifth of the entries, chosen by their triples."""
    (content,) = entry.values()
    digest = hashlib.sha256(json.dumps(content["modifiedtripleset"], sort_keys=True).encode())
    return int(digest.hexdigest(), 16) % 5 == 0


def main() -> None:
    """The three files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--unseen", nargs="+", default=UNSEEN, metavar="CATEGORY")
    options = parser.parse_args()
    entries = json.loads(options.source.read_text(encoding="utf-8"))["entries"]
    by_file: dict[str, list[Any]] = {"train": [], "seen": [], "unseen": []}
    known = {content["category"] for entry in entries for content in entry.values()}
    for name in options.unseen:
        if name not in known:
            raise SystemExit(f"--unseen: got {name}, takes one of {', '.join(sorted(known))}")
    for entry in entries:
        (content,) = entry.values()
        new = content["category"] in options.unseen
        by_file["unseen" if new else "seen" if is_held_out(entry) else "train"].append(entry)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, some in by_file.items():
        file = options.output / f"{name}.json"
        file.write_text(json.dumps({"entries": some}, ensure_ascii=False), encoding="utf-8")
        print(f"{file}: {len(some)} entries")


if __name__ == "__main__":
    main()
