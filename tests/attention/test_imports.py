"""What an import pulls in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


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
