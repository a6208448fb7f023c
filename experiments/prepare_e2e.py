"""E2E's text files as JSON lines with the columns that the task ``e2e_nlg`` has on the hub.

    python experiments/prepare_e2e.py FOLDER OUTPUT

FOLDER holds ``valid.txt`` and ``test.txt``, whose lines are ``name : X | food : Y||sentence``. OUTPUT
gets train.jsonl and validation.jsonl, both from valid.txt, with different meaning representations
(a tenth of them is held out), and test.jsonl, an object for each meaning representation of test.txt
with all its sentences as references.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path


def grouped(file: Path) -> dict[str, list[str]]:
    """The sentences of each meaning representation, in the order of the file."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        meaning, bars, sentence = line.partition("||")
        if not bars or not meaning.strip() or not sentence.strip():
            raise SystemExit(f"{file}, line {number}: takes 'name : X | food : Y||sentence'")
        found.setdefault(" ".join(meaning.split()), []).append(" ".join(sentence.split()))
    return found


def write(file: Path, rows: list[dict[str, object]]) -> None:
    """One row a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    print(f"{file}: {len(rows)} rows")


def held_out(meaning: str) -> bool:
    """A tenth of the meaning representations, whatever else is in the file."""
    return int(hashlib.sha256(meaning.encode()).hexdigest(), 16) % 10 == 0


def main() -> None:
    """The three files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    train, test = (grouped(options.folder / f"{name}.txt") for name in ("valid", "test"))
    every = [
        {"meaning_representation": meaning, "target": sentence, "references": []}
        for meaning, sentences in train.items()
        if not held_out(meaning)
        for sentence in sentences
    ]
    write(options.output / "train.jsonl", every)
    for name, groups in (
        ("validation", {m: s for m, s in train.items() if held_out(m)}),
        ("test", {m: s for m, s in test.items() if m not in train}),
    ):
        rows = [
            {"meaning_representation": meaning, "target": sentences[0], "references": sentences}
            for meaning, sentences in groups.items()
        ]
        write(options.output / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
