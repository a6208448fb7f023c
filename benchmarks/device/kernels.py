"""Compiled kernels in a folder that can be carried to the machine with the GPU.

The folder is a cache folder of Triton (TRITON_CACHE_DIR). Two things in such a folder are of the
machine and the Python that made it. :func:`settle` puts both right:

- the names of its folders hash Triton's own library, which is another file for every version of
  Python; KEYS lists the rest of what was hashed, so that the names can be made again;
- its lists of files hold absolute paths.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.compiler import compiler
from triton.runtime.cache import triton_key

KEYS = "keys.jsonl"  # in the folder, one line for each kernel that was asked for
GROUP = "__grp__"  # how the lists of files begin


@dataclass
class Loaded:
    """The project's kernels that a process asked Triton's compiler for.

    Attributes:
        found: names of those that lay in the cache folder.
        compiled: names of those that had to be compiled.
        before: processor seconds that this process and its children had used at the last count.
    """

    found: list[str] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)
    before: float = field(default_factory=lambda: sum(os.times()[:4]))

    def listen(self) -> None:
        """Counts from now on."""
        triton.knobs.compilation.listener = self._heard

    def take(self) -> dict[str, Any]:
        """What was counted since the last call, as a record has it."""
        now = sum(os.times()[:4])
        taken = {
            "found": len(self.found),
            "compiled": list(self.compiled),
            "processor_s": round(now - self.before, 2),
        }
        self.found, self.compiled, self.before = [], [], now
        return taken

    def _heard(self, *, src: Any, cache_hit: bool, **_: Any) -> None:
        if not getattr(getattr(src, "fn", None), "__module__", "").startswith("fastprefix"):
            return  # a kernel of torch.compile
        (self.found if cache_hit else self.compiled).append(src.name)


LOADED = Loaded()


def folder_name(key: str) -> str:
    """Triton's name for the folder of a kernel with this key."""
    digest = hashlib.sha256(key.encode()).digest()
    return base64.b32encode(digest).decode().rstrip("=")


def remember_keys() -> None:
    """From now on lists in KEYS what the kernels' names are made of, Triton's own part aside."""
    original: Callable[..., str] = compiler.get_cache_key
    seen: set[str] = set()

    def get_cache_key(*arguments: Any, **options: Any) -> str:
        key = original(*arguments, **options)
        if key not in seen:
            seen.add(key)
            line = {
                "triton": triton.__version__,
                "folder": folder_name(key),
                "rest": key.removeprefix(triton_key()),
            }
            folder = Path(triton.knobs.cache.dir)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / KEYS).open("a") as file:
                file.write(json.dumps(line) + "\n")
        return key

    compiler.get_cache_key = get_cache_key


def settle(folder: Path) -> int:
    """Makes a carried folder one of this machine; returns how many kernels it holds.

    Kernels of another version of Triton stay as they are, and are not found.
    """
    listed = {}
    if (folder / KEYS).exists():
        for text in (folder / KEYS).read_text().splitlines():
            line = json.loads(text)
            listed[line["triton"], line["rest"]] = line
    kernels = 0
    for line in listed.values():
        if line["triton"] == triton.__version__:
            name = folder_name(triton_key() + line["rest"])
            if name != line["folder"] and (folder / line["folder"]).exists():
                os.replace(folder / line["folder"], folder / name)
            line["folder"] = name
            kernels += (folder / name).exists()
    for group in folder.glob(f"*/{GROUP}*.json"):
        names = json.loads(group.read_text())["child_paths"]
        found = {name: str(group.parent / name) for name in names}
        found = {name: path for name, path in found.items() if os.path.exists(path)}
        group.write_text(json.dumps({"child_paths": found}))
    if listed:
        lines = "".join(json.dumps(line) + "\n" for line in listed.values())
        (folder / KEYS).write_text(lines)
    return kernels


def build_launchers(driver: Any) -> None:
    """Lets the simulated driver build Triton's C launchers too, where it builds one a signature.

    Up to 3.6 it does, with a C compiler, about a second each. They need the driver's library and
    are files of this Python, so they are built on the machine with the GPU.
    """
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    from triton.backends.nvidia.driver import CudaLauncher, libcuda_dirs

    try:
        libcuda_dirs()
    except (AssertionError, OSError):
        return  # no driver on this machine
    simulated = driver.launcher_cls

    def launcher_cls(src: Any, metadata: Any) -> Callable[..., None]:
        CudaLauncher(src, metadata)
        return simulated(src, metadata)

    driver.launcher_cls = launcher_cls
