"""Kernels compiled beforehand: a folder that is carried elsewhere is found there, whole."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from device import kernels

ROOT = Path(__file__).parents[3]
# Decodes on a simulated H200, with the real just-in-time compiler.
LAUNCHES = """
import json, sys
sys.path.insert(0, "benchmarks")
import torch
from device.kernels import LOADED
from device.simulation import simulate
simulate("sm_90")
LOADED.listen()
from fastprefix import prefix_attention
empty = lambda *size: torch.zeros(size, dtype=torch.bfloat16)
prefix_attention(
    empty(5, 8, 1, 16), empty(5, 2, 200, 16), empty(5, 2, 200, 16),
    empty(2, 300, 16), empty(2, 300, 16), is_causal=True, backend="triton",
)
print(json.dumps(LOADED.take()))
"""


def launches(folder):
    environment = {
        **os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder),
        "TRITON_STORE_BINARY_ONLY": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_process_finds_every_kernel_in_a_folder_that_moved(tmp_path):
    first = launches(tmp_path / "here")
    assert first["compiled"]
    (tmp_path / "here").rename(tmp_path / "there")
    assert kernels.settle(tmp_path / "there") == len(first["compiled"])
    second = launches(tmp_path / "there")
    assert second["compiled"] == []
    assert second["found"] == len(first["compiled"])


@pytest.fixture
def folder(tmp_path):
    """As another Python's Triton leaves it: one kernel, and the path that it had there."""
    name = kernels.folder_name("another Triton-rest")
    (tmp_path / name).mkdir()
    (tmp_path / name / "k.cubin").write_bytes(b"code")
    (tmp_path / name / "k.json").write_text("{}")
    paths = {n: f"/elsewhere/{name}/{n}" for n in ("k.cubin", "k.json", "k.ptx")}
    (tmp_path / name / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
    return tmp_path


def remember(folder, version):
    line = {
        "triton": version,
        "folder": kernels.folder_name("another Triton-rest"),
        "rest": "-rest",
    }
    (folder / kernels.KEYS).write_text(2 * (json.dumps(line) + "\n"))


def test_names_and_paths_become_those_of_this_machine(folder):
    remember(folder, kernels.triton.__version__)
    for _ in range(2):  # settling twice does no harm
        assert kernels.settle(folder) == 1
        here = folder / kernels.folder_name(f"{kernels.triton_key()}-rest")
        paths = json.loads((here / "__grp__k.json").read_text())["child_paths"]
        assert paths == {n: str(here / n) for n in ("k.cubin", "k.json")}


def test_kernels_of_another_triton_are_not_taken_for_ours(folder):
    remember(folder, "0.1")
    assert kernels.settle(folder) == 0
    assert not (folder / kernels.folder_name(f"{kernels.triton_key()}-rest")).exists()


def test_folders_are_named_as_triton_names_them():
    from triton.runtime.cache import _base32

    key = "any key"
    assert kernels.folder_name(key) == _base32(hashlib.sha256(key.encode()).hexdigest())


def test_a_folder_without_kernels(tmp_path):
    assert kernels.settle(tmp_path) == 0
