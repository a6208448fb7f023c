"""Configurations that refuse what they do not know, in one line that names the field."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

_Settings = TypeVar("_Settings", bound="Settings")


class Settings(BaseModel):
    """A configuration: fields with types and defaults, unknown ones refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @classmethod
    def of(cls: type[_Settings], values: Mapping[str, Any], where: str = "") -> _Settings:
        """The configuration with these values.

        Args:
            values: by field.
            where: what they come from, for messages: a file's name.

        Raises:
            ValueError: a field is unknown (the nearest is named), is missing, or has a value that
                it does not take. All that is wrong is told in one line.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            told = "; ".join(cls._told(each) for each in error.errors(include_url=False))
            raise ValueError(f"{where}: {told}" if where else told) from None

    @classmethod
    def read(cls: type[_Settings], file: Path) -> _Settings:
        """The configuration in a YAML file.

        Raises:
            ValueError: the file is no mapping in YAML, or :meth:`of` refuses it.
            OSError: it cannot be read.
        """
        return cls.of(read_yaml(file), str(file))

    def plain(self) -> dict[str, Any]:
        """All fields as values that YAML and JSON can hold."""
        return self.model_dump(mode="json")

    def yaml(self) -> str:
        """The configuration as :meth:`read` takes it, fields in their order."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)

    @classmethod
    def _told(cls, error: Any) -> str:
        """One of pydantic's errors in the grammar of this library's."""
        place = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            near = difflib.get_close_matches(place, cls.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"takes {', '.join(cls.model_fields)}"
            return f"{place}: unknown; {hint}"
        if error["type"] == "missing":
            return f"{place}: got nothing, takes a value"
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] in ("value_error", "assertion_error"):
            return message if not place or message.startswith(place) else f"{place}: {message}"
        return f"{place}: got {error['input']!r}, takes {message.removeprefix('Input should be ')}"


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; no other kind of value is taken.

    Raises:
        ValueError: the file is not YAML, or not a mapping of names.
        OSError: it cannot be read.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{file}: not YAML ({told})") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{file}: got {type(values).__name__}, takes fields with values")
    return values
