"""The model card of a saved adapter, and uploading one to the Hugging Face hub."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastprefix.files import written_whole
from fastprefix.formats.peft_files import CONFIG_FILE
from fastprefix.formats.source import Source

if TYPE_CHECKING:
    from fastprefix.tuning.tuned_model import TunedModel

CARD_FILE = "README.md"
_LIBRARIES = ("peft", "fastprefix")
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


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


def write_card(tuned: TunedModel, folder: Path) -> None:
    """Writes README.md, or completes the metadata of an existing one.

    The text of an existing card, and the metadata that its author set, are never changed. If its
    metadata cannot be read, the card is left as it is, with a warning.

    Args:
        tuned: the model whose adapters the folder holds.
        folder: the folder, after its adapters were written.
    """
    from huggingface_hub import ModelCard  # only needed to save

    file = folder / CARD_FILE
    try:
        card = ModelCard.load(file) if file.is_file() else ModelCard(_text(tuned))
    except Exception as error:  # from YAML, UTF-8 or the hub's client
        message = f"{file}: left as it is, for its metadata cannot be read ({error})"
        warnings.warn(message, stacklevel=5)
        return
    data: Any = card.data
    for name, value in _metadata(tuned, folder).items():
        if name == "tags":
            data.tags = sorted({*(data.get("tags") or ()), *value})
        elif name == "library_name" and data.get(name) in _LIBRARIES:
            data.library_name = value  # the formats of the files may have changed
        elif data.get(name) is None:
            setattr(data, name, value)
    with written_whole(file) as partial:
        card.save(partial)


def push(
    tuned: TunedModel,
    repo_id: str,
    *,
    tags: Sequence[str] | None,
    private: bool | None,
    token: bool | str | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
    commit_description: str | None,
    **saving: Any,
) -> Any:
    """Saves into a temporary folder and uploads it; see :meth:`TunedModel.push_to_hub`."""
    from huggingface_hub import HfApi, ModelCard  # only needed to upload

    api = HfApi()
    repository = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repository, branch=revision, token=token, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = Source(repository, revision=revision, token=token)
        if (card_there := place.look_for(CARD_FILE)) is not None:
            (folder / CARD_FILE).write_bytes(card_there.read_bytes())
        tuned.save_pretrained(folder, **saving)
        if tags:
            card = ModelCard.load(folder / CARD_FILE)
            data: Any = card.data
            data.tags = sorted({*(data.get("tags") or ()), *tags})
            card.save(folder / CARD_FILE)
        return api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message or "Upload adapter",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


def _metadata(tuned: TunedModel, folder: Path) -> dict[str, Any]:
    """The metadata of a card, which the hub reads."""
    config = tuned.peft_config.get(tuned.active_adapter)
    kinds = {one.peft_type.lower().replace("_", "-") for one in tuned.peft_config.values()}
    found: dict[str, Any] = {
        "library_name": _LIBRARIES[0] if _peft_loads(folder) else _LIBRARIES[1],
        "tags": {"fastprefix", "transformers", *kinds, *(tuned.base_model.model_tags or ())},
    }
    if (name := _base_name(tuned)) is not None:
        found["base_model"] = name
        found["tags"].add(f"base_model:adapter:{name}")
    if config is not None and config.task_type in _PIPELINES:
        found["pipeline_tag"] = _PIPELINES[config.task_type]
    return found


def _peft_loads(folder: Path) -> bool:
    """Whether PEFT knows the formats of all adapters in a folder; the hub then shows its code."""
    files = [*folder.glob(CONFIG_FILE), *folder.glob(f"*/{CONFIG_FILE}")]
    kinds = {json.loads(file.read_text(encoding="utf-8")).get("peft_type") for file in files}
    return not any(str(kind).startswith("FASTPREFIX") for kind in kinds)


def _base_name(tuned: TunedModel) -> str | None:
    """The base's name on the hub; None if the base was loaded from a local folder."""
    name = getattr(tuned.base_model, "name_or_path", None) or None
    local = name is not None and (Path(name).is_absolute() or Path(name).exists())
    return None if local else name


def _text(tuned: TunedModel) -> str:
    """The text of a new card: what the files are, and how to load them."""
    kind, base = type(tuned).__name__, type(tuned.base_model).__name__
    name = _base_name(tuned) or "the base model"
    place = '"this repository or folder"'
    lines: list[str] = []
    for adapter in tuned.peft_config:
        more = "" if adapter == "default" else f', "{adapter}", subfolder="{adapter}"'
        load = f"tuned = {kind}.from_pretrained(model, " if not lines else "tuned.load_adapter("
        lines.append(f"{load}{place}{more})")
    code = "\n".join(lines)
    return f"""# {kind} of {name}

Trained with fastprefix. The base model is frozen and not part of this.

```python
from transformers import {base}
from fastprefix import {kind}

model = {base}.from_pretrained("{name}")
{code}
```
"""
