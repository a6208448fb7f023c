"""Which names adapters may have, and the two names with a meaning."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from fastprefix.arguments import check_type
from fastprefix.tuning.peft_base import BASE_FOLDER

DEFAULT = "default"
# The name that trl's trainers give to a copy of the policy from before the training.
REFERENCE = "ref"


def check_new_name(adapter_name: str, taken: Collection[str]) -> None:
    """Refuses a name that is in use, or that cannot name a folder and a part of parameters.

    Args:
        adapter_name: the name of the adapter to add.
        taken: the names in use.

    Raises:
        TypeError: the name is no text.
        ValueError: the name is refused.
    """
    check_type("adapter_name", adapter_name, str, "a name")
    if adapter_name in taken:
        raise ValueError(
            f"adapter_name: got {adapter_name!r}, which there is already, takes a new name"
        )
    # it becomes the name of a folder, and a part of parameters' names
    if not adapter_name or set(adapter_name) & set("./\\\0") or adapter_name == BASE_FOLDER:
        raise ValueError(
            f"adapter_name: got {adapter_name!r}, takes a name without '.', '/', '\\' and NUL, "
            f"other than {BASE_FOLDER!r}"
        )
    length = len(adapter_name.encode("utf-8", "surrogatepass"))
    if length > 255 or adapter_name.encode("utf-8", "replace").decode() != adapter_name:
        raise ValueError(
            f"adapter_name: got one of {length} bytes, takes one that a folder can have: UTF-8 "
            "of up to 255 bytes"
        )
    if hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"adapter_name: got {adapter_name!r}, takes none that torch.nn.ModuleDict has"
        )
