"""The model card of saved adapters."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fastprefix.files import written_whole
from fastprefix.formats.peft_files import CONFIG_FILE

CARD_FILE = "README.md"
_LIBRARIES = ("peft", "fastprefix")
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


@dataclass(frozen=True)
class CardContent:
    """What a card says about a model.

    Attributes:
        model_class: the name of the tuned model's class.
        base_model: the base.
        configs: the configurations of all adapters, by name.
        active_adapter: the name of the active adapter; None if none is active.
    """

    model_class: str
    base_model: PreTrainedModel
    configs: Mapping[str, Any]
    active_adapter: str | None

    @property
    def base_name(self) -> str | None:
        """The base's name on the hub; None if the base was loaded from a local folder."""
        name = getattr(self.base_model, "name_or_path", None) or None
        is_local = name is not None and (Path(name).is_absolute() or Path(name).exists())
        return None if is_local else name


def write_card(content: CardContent, folder: Path) -> None:
    """Writes README.md, or completes the metadata of an existing one.

    The text of an existing card, and the metadata that its author set, are never changed. If its
    metadata cannot be read, the card is left as it is, with a warning.

    Args:
        content: what the card says about the model whose adapters the folder holds.
        folder: the folder, after its adapters were written.
    """
    from huggingface_hub import ModelCard  # only needed to save

    file = folder / CARD_FILE
    try:
        card = ModelCard.load(file) if file.is_file() else ModelCard(_text(content))
    except Exception as error:  # from YAML, UTF-8 or the hub's client
        message = f"{file}: left as it is, for its metadata cannot be read ({error})"
        warnings.warn(message, stacklevel=5)
        return
    data: Any = card.data
    for name, value in _metadata(content, folder).items():
        if name == "tags":
            data.tags = sorted({*(data.get("tags") or ()), *value})
        elif name == "library_name" and data.get(name) in _LIBRARIES:
            data.library_name = value  # the formats of the files may have changed
        elif data.get(name) is None:
            setattr(data, name, value)
    with written_whole(file) as partial:
        card.save(partial)


def _metadata(content: CardContent, folder: Path) -> dict[str, Any]:
    """The metadata of a card, which the hub reads."""
    active = content.active_adapter
    config = None if active is None else content.configs.get(active)
    kinds = {one.peft_type.lower().replace("_", "-") for one in content.configs.values()}
    found: dict[str, Any] = {
        "library_name": _LIBRARIES[0] if _peft_loads(folder) else _LIBRARIES[1],
        "tags": {"fastprefix", "transformers", *kinds, *(content.base_model.model_tags or ())},
    }
    if (name := content.base_name) is not None:
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


def _text(content: CardContent) -> str:
    """The text of a new card: what the files are, and how to load them."""
    kind, base = content.model_class, type(content.base_model).__name__
    name = content.base_name or "the base model"
    place = '"this repository or folder"'
    lines: list[str] = []
    for adapter in content.configs:
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
