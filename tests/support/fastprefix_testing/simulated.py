"""Test files that run in a Python of their own, in which Triton's interpreter is off.

Triton's JIT needs such a Python, and a simulated GPU stays for the rest of a process. Where the
interpreter is on, one test of the file starts that Python, and the others run inside of it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SIMULATED = os.environ.get("TRITON_INTERPRET") == "0"
inside = pytest.mark.skipif(not SIMULATED, reason="runs in the Python of test_on_a_simulated_gpu")
outside = pytest.mark.skipif(SIMULATED, reason="this is that Python")


def run_inside(file: str) -> None:
    """Runs a test file in a Python of its own; all of its tests must pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", file],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
