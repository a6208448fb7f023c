"""An environment in which nothing was done but `pip install '.[tasks]'`, and processes in it."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[3]


def run(command: list[Any], cwd: Path, **env: str) -> str:
    """What a command prints, standard error behind it; it must succeed."""
    ours = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": "", **env}
    ours.pop("TRITON_INTERPRET", None)  # of these tests, and no user's
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=ours,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def checkout(folder: Path) -> Path:
    """A copy of what git would have, and no more, in a folder that is not there yet."""
    left_out = (".*", "build", "dist", "*.egg-info", "__pycache__", "results")
    return shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*left_out))


class Fresh(NamedTuple):
    """The environment's Python, and the copy of the repository that it was made from."""

    python: Path
    source: Path


def fresh_environment(source: Path) -> Fresh:
    """Made from a copy in `source`, which is not there yet.

    Its dependencies stay in .cache for the next time, unless what asks for them changes.
    """
    checkout(source)
    folder = ROOT / ".cache" / "fresh"
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    files = [ROOT / "constraints.txt", ROOT / "pyproject.toml"]
    made_from = "\n".join([sys.version, *(file.read_text(encoding="utf-8") for file in files)])
    stamp = folder / "made-from.txt"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    if stamp.exists() and stamp.read_text(encoding="utf-8") == made_from:
        # the same dependencies; only fastprefix is new, built by the setuptools that torch brought
        run([*pip, "--no-deps", "--no-build-isolation", "--force-reinstall", ".[tasks]"], source)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        run([*pip, "-c", "constraints.txt", ".[tasks]"], source)
        stamp.write_text(made_from, encoding="utf-8")
    return Fresh(python, source)
