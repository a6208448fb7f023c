"""Where an adapter's files are: in a folder of this machine, or a repository on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprefix.files import finish


@dataclass(frozen=True)
class Source:
    """A folder, or a repository by name, whose files are downloaded when they are asked for.

    Attributes:
        name: of either.
        subfolder: of it, where the files are.
        revision: branch, tag or commit of a repository.
        token: the hub's, True for the one that is stored on this machine.
        cache_dir: where downloads go.
    """

    name: str
    subfolder: str | None = None
    revision: str | None = None
    token: bool | str | None = None
    cache_dir: str | None = None

    def __str__(self) -> str:
        return self.name if self.subfolder is None else f"{self.name}/{self.subfolder}"

    @property
    def folder(self) -> Path | None:
        """The folder of this machine; None for a repository."""
        if not Path(self.name).is_dir():
            return None
        return Path(self.name) if self.subfolder is None else Path(self.name) / self.subfolder

    def find(self, file: str) -> Path:
        """A file by its name, or by its path within the folder.

        Raises:
            FileNotFoundError: no such folder, or no such file in it.
            ValueError: see :func:`fastprefix.files.finish`.
        """
        if (folder := self.folder) is not None:
            finish(folder)
            path = folder / file
            if not path.is_file():
                raise FileNotFoundError(f"{self}: no {file} in this folder")
            return path
        if Path(self.name).is_absolute() or self.name.count("/") > 1:
            raise FileNotFoundError(f"{self}: no such folder")
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        given: dict[str, Any] = {"subfolder": self.subfolder, "revision": self.revision}
        given |= {"token": self.token, "cache_dir": self.cache_dir}
        options = {name: value for name, value in given.items() if value is not None}
        try:
            return Path(hf_hub_download(self.name, file, **options))
        except RemoteEntryNotFoundError as error:
            raise FileNotFoundError(f"{self}: no {file} in this repository") from error

    def look_for(self, file: str) -> Path | None:
        """A file as in :meth:`find`, or None where there is none of that name."""
        try:
            return self.find(file)
        except FileNotFoundError:  # the hub's client's, too, which is offline
            return None


def source(name_or_folder: str | Path | Source) -> Source:
    """What a caller named, as a :class:`Source`."""
    return name_or_folder if isinstance(name_or_folder, Source) else Source(str(name_or_folder))
