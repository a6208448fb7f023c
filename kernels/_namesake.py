"""For whoever meets this folder under the name ``kernels``, which is another package's."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def stand_aside() -> None:
    """Puts the installed package ``kernels``, if there is one, in this one's place.

    Python starts it from sys.path without the repository's root. Where it is not installed the
    importing code gets an empty package, which offers nothing.
    """
    path = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]
    spec = PathFinder.find_spec("kernels", path)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    for name in [name for name in sys.modules if name.startswith("kernels.")]:
        del sys.modules[name]
    sys.modules["kernels"] = module  # the import machinery returns what it finds here
    spec.loader.exec_module(module)
