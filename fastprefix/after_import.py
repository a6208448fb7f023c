"""Something to do once another library's module has been imported, without importing it.

A finder at the front of ``sys.meta_path`` lets the other finders find the module, and has a
function called when the module has run. It looks at nothing but names, and a module that nobody
imports costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Then = Callable[[ModuleType], None]


def after_import(name: str, then: Then) -> None:
    """Calls a function with a module: now if it has been imported, else once it is.

    Args:
        name: the module's, or that of a package and ".*" for every module in it.
        then: must not import what is being imported; the module's import lock is held.
    """
    package = name.removesuffix("*") if name.endswith(".*") else None
    watcher = _Watcher(name, package, then)
    sys.meta_path.insert(0, watcher)
    # behind the line above: a module that another thread imports meanwhile is seen twice, not never
    for known in [n for n, m in list(sys.modules.items()) if m is not None and watcher.wants(n)]:
        module = importlib.import_module(known)  # waits for another thread that is importing it
        if not getattr(getattr(module, "__spec__", None), "_initializing", False):
            watcher.done(module)


class _Watcher(MetaPathFinder):
    """Finds what the others find, and has a function called when it has run."""

    def __init__(self, name: str, package: str | None, then: Then) -> None:
        self.name = name
        self.package = package
        self.then = then

    def wants(self, name: str) -> bool:
        """Whether to call the function for a module."""
        return name == self.name if self.package is None else name.startswith(self.package)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See ``importlib.abc.MetaPathFinder``."""
        if not self.wants(fullname):
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :] if self in sys.meta_path else []
        for finder in behind:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Then(spec.loader, self)
                return spec
        return None

    def done(self, module: ModuleType) -> None:
        """Calls the function; a watcher of one module has done its work."""
        self.then(module)
        if self.package is None:
            # a new list: another thread may be walking through the old one
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]


class _Then(Loader):
    """Another loader, until it runs the module: the module itself keeps that one."""

    def __init__(self, loader: Loader, watcher: _Watcher) -> None:
        self._loader = loader
        self._watcher = watcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """See ``importlib.abc.Loader``."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """See ``importlib.abc.Loader``."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._watcher.done(module)

    def __getattr__(self, name: str) -> object:
        """What else importlib, inspect or pkgutil ask of a loader."""
        if name == "_loader":  # while a copy is made, before it has one
            raise AttributeError(name)
        return getattr(self._loader, name)
