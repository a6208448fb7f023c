"""``fastprefix eval``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fastprefix.cli.console import tell, working
from fastprefix.training.config import RunConfig
from fastprefix.training.evaluation import evaluate_run


def run_evaluation(
    config: RunConfig,
    folder: Path,
    split: str | None,
    data_files: Mapping[str, str],
    limit: int | None,
    batch_size: int,
) -> None:
    """Loads what a run has trained, measures it, and prints the figures."""
    with working(f"measuring {folder}"):
        split, count, found = evaluate_run(config, folder, split, data_files, limit, batch_size)
    tell(f"{count} examples of {split}")
    print(json.dumps(found, indent=1))
