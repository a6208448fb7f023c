"""CONTRIBUTING names only paths that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PATHS = sorted(
    set(re.findall(r"`((?:fastprefix|kernels|benchmarks|tools|examples|tests)/[\w./]*)`", TEXT))
)


@pytest.mark.parametrize("path", [path for path in PATHS if "FOLDER" not in path])
def test_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_paths_are_found() -> None:
    assert len(PATHS) > 20
