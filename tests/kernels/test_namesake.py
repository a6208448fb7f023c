"""Our folder ``kernels/`` and Hugging Face's package of that name, from the repository's root."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_installed_package_is_what_others_import() -> None:
    if importlib.util.find_spec("kernels") is None:
        pytest.skip("Hugging Face's package `kernels` is not installed")
    code = "import kernels; from kernels import get_kernel; print(kernels.__file__)"
    assert not Path(run(code)).is_relative_to(ROOT / "kernels")


def test_where_it_is_not_installed_others_find_an_empty_package() -> None:
    code = (
        "import importlib.machinery as m, sys; find = m.PathFinder.find_spec; "
        "m.PathFinder.find_spec = classmethod(lambda c, n, p=None, t=None: "
        "None if n == 'kernels' and p is not None else find(n, p, t)); "
        "import kernels; "
        "print(hasattr(kernels, 'prefix_attention_forward'), 'triton' in sys.modules)"
    )
    assert run(code) == "False False"


def test_ours_is_found_under_its_own_name_all_the_same() -> None:
    code = (
        "import transformers, fastprefix.kernels as k; print(k.prefix_attention_forward.__name__)"
    )
    assert "prefix_attention_forward" in run(code)
