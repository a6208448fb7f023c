"""What an import pulls in, and that the folder `kernels/` shadows nobody's package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str, cwd: Path, **env: str) -> str:
    """Standard output of a fresh interpreter; `python -c` puts cwd on sys.path."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light(tmp_path):
    """Neither Triton nor transformers is imported before it is needed."""
    code = """
        import json, sys
        import torch
        before = set(sys.modules)
        import fastprefix
        print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
        """
    imported = json.loads(python(code, tmp_path))
    assert "fastprefix" in imported
    assert not {"triton", "transformers", "peft", "kernels"} & set(imported)


def test_composed_never_touches_our_kernels(tmp_path):
    """PyTorch may import Triton for reasons of its own; our kernels wait for a kernel to run."""
    code = """
        import sys, torch
        from fastprefix import prefix_attention
        x = torch.randn(1, 2, 3, 8, requires_grad=True)
        prefix_attention(x, x, x, x[0], x[0]).sum().backward()
        assert "fastprefix.kernels" not in sys.modules
        """
    python(code, tmp_path)


def test_works_where_triton_is_not_installed(tmp_path):
    """None in sys.modules makes `import triton` fail and Python's finders report no package."""
    code = """
        import sys
        sys.modules["triton"] = None
        import torch
        from fastprefix import prefix_attention
        x = torch.randn(1, 2, 3, 8)
        for backend in ("auto", "composed", "reference"):
            prefix_attention(x, x, x, x[0], x[0], backend=backend)
        try:
            prefix_attention(x, x, x, backend="triton")
        except RuntimeError as error:
            print(error)
        """
    message = python(code, tmp_path, TRITON_INTERPRET="1")
    assert "Triton is not installed" in message
    assert "'composed'" in message.split("Backends that can")[1]


def test_triton_on_the_cpu_asks_for_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    code = """
        import torch
        from fastprefix import prefix_attention
        x = torch.randn(1, 2, 3, 8)
        try:
            prefix_attention(x, x, x, backend="triton")
        except RuntimeError as error:
            print(error)
        """
    assert "TRITON_INTERPRET=1" in python(code, tmp_path, TRITON_INTERPRET="0")


def test_transformers_imports_from_the_repository_root():
    """There, a folder named like Hugging Face's package `kernels` is on sys.path."""
    pytest.importorskip("transformers")
    code = """
        import transformers
        from transformers import LlamaConfig, LlamaForCausalLM
        config = LlamaConfig(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1,
        )
        LlamaForCausalLM(config)
        print("ok")
        """
    assert "ok" in python(code, ROOT)


def test_transformers_finds_its_own_kernels_package_beside_ours(tmp_path):
    pytest.importorskip("transformers")
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's package `kernels` is not installed")
    code = """
        import fastprefix.kernels
        import kernels
        from transformers import LlamaForCausalLM
        assert kernels.__file__ != fastprefix.kernels.__file__, kernels.__file__
        assert hasattr(kernels, "get_kernel")
        """
    python(code, tmp_path)


def test_no_top_level_package_named_kernels_is_installed(tmp_path):
    code = """
        import importlib.metadata, json
        files = importlib.metadata.distribution("fastprefix").read_text("top_level.txt") or ""
        print(json.dumps(files.split()))
        """
    if importlib.util.find_spec("fastprefix") is None:
        pytest.skip("fastprefix is not installed as a distribution")
    assert "kernels" not in json.loads(python(code, tmp_path))
