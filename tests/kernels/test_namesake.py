"""Our folder ``kernels/`` and Hugging Face's package of that name.

The folder is no package. A package of that name, wherever it stands on the path, comes before a
plain folder, so Python started in the repository's root finds Hugging Face's.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = (
    "import transformers; from transformers import LlamaConfig, LlamaForCausalLM; "
    "LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, "
    "num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)); "
)
# Hides an installed `kernels` from Python's finder; the folder in the root stays visible.
NOT_INSTALLED = (
    "import importlib.machinery as m, sys; "
    "find = m.PathFinder.find_spec; "
    "m.PathFinder.find_spec = classmethod(lambda c, n, p=None, t=None: "
    "find(n, ['']) if n == 'kernels' else find(n, p, t)); "
)


def run(code: str, cwd: Path = ROOT) -> str:
    """What a fresh interpreter prints; `python -c` puts `cwd` on sys.path."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("from_root", [True, False])
def test_the_installed_package_is_what_others_import(from_root: bool, tmp_path: Path) -> None:
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's package `kernels` is not installed")
    code = (
        "import fastprefix.kernels, kernels; from kernels import get_kernel; "
        f"{MODEL} print(kernels.__file__)"
    )
    printed = run(code, ROOT if from_root else tmp_path)
    assert not Path(printed).is_relative_to(ROOT / "kernels")


def test_where_it_is_not_installed_others_find_an_empty_package() -> None:
    code = NOT_INSTALLED + (
        "import kernels; "
        "print(hasattr(kernels, 'prefix_attention_forward'), 'triton' in sys.modules)"
    )
    assert run(code) == "False False"


def test_transformers_imports_where_it_is_not_installed() -> None:
    assert run(NOT_INSTALLED + MODEL + "print('ok')") == "ok"


def test_ours_is_found_under_its_own_name() -> None:
    code = MODEL + "import fastprefix.kernels as k; print(k.prefix_attention_forward.__name__)"
    assert "prefix_attention_forward" in run(code)


def test_no_top_level_package_named_kernels_is_installed(tmp_path: Path) -> None:
    code = (
        "import importlib.metadata as m; "
        "print(m.distribution('fastprefix').read_text('top_level.txt') or '')"
    )
    if importlib.util.find_spec("fastprefix") is None:
        pytest.skip("fastprefix is not installed as a distribution")
    assert "kernels" not in run(code, tmp_path).split()
