"""The configuration of a run from a YAML file and what was typed. PyTorch is not imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastprefix.cli import inputs
from fastprefix.training.config import CONFIG, RunConfig
from fastprefix.training.settings import read_yaml


def run_config(
    file: Path | None,
    typed: Mapping[str, Any],
    options: Sequence[str],
    settings: Sequence[str],
) -> RunConfig:
    """What a run is configured with; what was typed counts more than the file.

    Args:
        file: a YAML file of fields, or None.
        typed: fields by name; None was not typed.
        options: "NAME=VALUE" of the method's configuration.
        settings: "FIELD=VALUE" of any field.

    Raises:
        ValueError: a field is unknown, or has a value that it does not take.
    """
    values: dict[str, Any] = {}
    if file is not None:
        inputs.file_to_read(file, "config")
        values |= read_yaml(file)
    values |= pairs(settings, "--set", parsed=True)
    values |= {name: value for name, value in typed.items() if value is not None}
    if options:
        values["options"] = {**values.get("options", {}), **pairs(options, "--option", parsed=True)}
    config = RunConfig.of({"task": "descriptions"} | values)
    inputs.model(config.model)
    for name, path in (config.data_files or {}).items():
        inputs.file_to_read(Path(path), f"--data-files: {name}")
    return config


def run_of(folder: Path) -> RunConfig | None:
    """The configuration of a run; None if the folder is not one.

    Raises:
        ValueError: its configuration is damaged.
    """
    file = folder / CONFIG
    return RunConfig.read(file) if inputs.exists(file) else None


def pairs(typed: Sequence[str], argument: str, parsed: bool = False) -> dict[str, Any]:
    """Values by name, of what was typed as NAME=VALUE.

    Args:
        typed: what was typed.
        argument: as what, for messages.
        parsed: values are read as YAML: numbers, true, lists.

    Raises:
        ValueError: something has no "=", or a name comes twice, or a value is not YAML.
    """
    found: dict[str, Any] = {}
    for each in typed:
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise ValueError(f"{argument}: got {each!r}, takes NAME=VALUE")
        if name in found:
            raise ValueError(f"{argument}: got {name} twice, takes it once")
        try:
            found[name] = yaml.safe_load(value) if parsed else value
        except yaml.YAMLError as error:
            raise ValueError(f"{argument}: got {each!r}, whose value is not YAML") from error
    return found
