"""The folder of a run: a readable name, and a hash of all that decides its result."""

from __future__ import annotations

import hashlib
import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fastprefix.tasks.registry import get_task
from fastprefix.tasks.task import PackageSource
from fastprefix.training.config import RunConfig
from fastprefix.training.sources import model_source

_DIGITS = 12  # of the hash
_LONGEST = 80  # characters of the readable part


class Addresses:
    """Finds the folders of runs. Each file is read once, however many runs use it.

    Args:
        folder: that holds those of all runs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests: dict[Path, str] = {}  # of files and folders of files
        self._folders: dict[str, Path] = {}  # of runs, by their hash

    def of(self, config: RunConfig, label: str) -> Path:
        """The folder of a run.

        One with the right hash is taken whatever its name, so that a method can be renamed.

        Args:
            config: of the run.
            label: what a new folder is named after.

        Raises:
            FileNotFoundError: a data file or the model is missing.
        """
        code = self._hash(config)
        if code not in self._folders:
            readable = re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-.")[:_LONGEST]
            there = sorted(self._folder.glob(f"*-{code}"))
            new = self._folder / f"{readable or 'run'}-{code}"
            self._folders[code] = there[0] if there else new
        return self._folders[code]

    def _hash(self, config: RunConfig) -> str:
        """Of the configuration, and of the content of the files that it names."""
        files = {**(config.files or {}), **(config.more_tests or {})}
        content = {name: self._digest(Path(file)) for name, file in files.items()}
        source, _ = model_source(config.model)
        if Path(source).exists():  # else it is a name on the hub
            content["model"] = self._digest(Path(source))
        data = get_task(config.task).source
        if isinstance(data, PackageSource) and config.data_files is None:
            content["package"] = _version(data.package)
        # without defaults: a field that a later version adds does not make old runs other ones
        told = config.model_dump(mode="json", exclude_defaults=True)
        text = json.dumps([told, content], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]

    def _digest(self, path: Path) -> str:
        """Of a file with its name, or of all files in a folder with theirs."""
        path = path.resolve()
        if path not in self._digests:
            if not path.exists():
                raise FileNotFoundError(f"data_files: there is no file {path}")
            digest = hashlib.sha256()
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    name = file.relative_to(path) if path.is_dir() else file.name
                    digest.update(f"{name}\0{_of_content(file)}\0".encode())
            self._digests[path] = digest.hexdigest()
        return self._digests[path]


def _of_content(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # the run itself says that it is missing
        return ""
