"""Where an adapter's files are: in a local folder, or in a repository on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprefix.files import finish


@dataclass(frozen=True)
class Source:
    """A local folder, or a repository on the hub. Files are downloaded when they are asked for.

    Attributes:
        name: the folder, or the repository's name.
        subfolder: the sub-folder that holds the files.
        revision: a branch, tag or commit of the repository.
        token: the hub's access token; True for the one that is stored on this machine.
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
        """The local folder; None for a repository."""
        if not Path(self.name).is_dir():
            return None
        return Path(self.name) if self.subfolder is None else Path(self.name) / self.subfolder

    def find(self, file: str) -> Path:
        """Finds a file by its name, or by its path within the folder.

        Raises:
            FileNotFoundError: there is no such folder, or no such file in it.
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
        """Finds a file as :meth:`find` does; returns None if there is none."""
        try:
            return self.find(file)
        except FileNotFoundError:  # the hub's client raises it too, if it is offline
            return None


def as_source(name_or_folder: str | Path | Source) -> Source:
    """Makes a :class:`Source` of a name; returns one as it is."""
    return name_or_folder if isinstance(name_or_folder, Source) else Source(str(name_or_folder))
