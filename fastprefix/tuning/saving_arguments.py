"""Checks of the arguments with which adapters are saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def check_directory(save_directory: str | Path, push_to_hub: bool) -> None:
    """Refuses, before anything is written, what ``save_pretrained`` cannot do.

    Raises:
        ValueError: save_directory is a file, or push_to_hub is not False.
    """
    if Path(save_directory).is_file():
        raise ValueError(f"save_directory: got the file {save_directory}, takes a folder")
    if push_to_hub:
        raise ValueError(
            f"push_to_hub: got {push_to_hub!r}, takes False; push_to_hub(repo_id) uploads"
        )


def check_loading(torch_device: Any, low_cpu_mem_usage: bool) -> None:
    """Checks two arguments that exist for PEFT's sake and have no effect here.

    Raises:
        TypeError: low_cpu_mem_usage is neither True nor False.
        ValueError: torch_device is no device.
    """
    if not isinstance(low_cpu_mem_usage, bool):
        raise TypeError(f"low_cpu_mem_usage: got {low_cpu_mem_usage!r}, takes True or False")
    if torch_device is not None:
        try:
            torch.device(torch_device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"torch_device: got {torch_device!r}, takes a device") from error
