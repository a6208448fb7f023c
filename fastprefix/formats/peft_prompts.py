"""Prompts of input embeddings, in the format of PEFT's PROMPT_TUNING and P_TUNING adapters.

PEFT stores the embeddings that enter the model, ``prompt_embeddings`` [P, width of an embedding].
It does not save P-tuning's network. For an encoder-decoder the tensor may be [2 · P, width]; PEFT
reads only its first half.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastprefix.formats.peft_files import read_adapter, write_adapter
from fastprefix.formats.source import Source

PROMPT_KINDS = ("PROMPT_TUNING", "P_TUNING")
# A prompt within the text. PEFT has no such method, and refuses this peft_type.
INFIX_KIND = "FASTPREFIX_INFIX"


@dataclass(frozen=True)
class Prompt:
    """What a prompt's folder holds.

    Attributes:
        embeddings: [P, width].
        config: the fields of adapter_config.json.
        heads: see :class:`fastprefix.formats.peft_files.AdapterFiles`.
    """

    embeddings: Tensor
    config: dict[str, Any]
    heads: dict[str, Tensor] = field(default_factory=dict)


def save_prompt(
    folder: str | Path,
    embeddings: Tensor,
    config: dict[str, Any],
    *,
    kind: str = "PROMPT_TUNING",
    heads: dict[str, Tensor] | None = None,
    safe_serialization: bool = True,
) -> None:
    """Writes a prompt so that PEFT's ``PeftModel.from_pretrained`` and ours can load it.

    Args:
        folder: created if it does not exist; files of these names in it are replaced.
        embeddings: [P, width].
        config: further fields of PEFT's configuration (task_type, base_model_name_or_path).
        kind: "PROMPT_TUNING", "P_TUNING", or "FASTPREFIX_INFIX", which PEFT cannot load.
        heads: see :class:`Prompt`.
        safe_serialization: see :func:`fastprefix.formats.peft_files.write_adapter`.

    Raises:
        OSError: the files cannot be written.
        ValueError: the kind is unknown.
    """
    if kind not in (*PROMPT_KINDS, INFIX_KIND):
        raise ValueError(f"kind: got {kind!r}, takes one of {(*PROMPT_KINDS, INFIX_KIND)}")
    P, width = embeddings.shape
    fields: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": None,
        "num_layers": None,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": P,
        "peft_type": kind,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": width,
    }
    if kind == "P_TUNING":
        fields.update(
            encoder_dropout=0.0,
            encoder_hidden_size=width,
            encoder_num_layers=2,
            encoder_reparameterization_type="MLP",
        )
    elif kind == "PROMPT_TUNING":
        fields.update(prompt_tuning_init="RANDOM", prompt_tuning_init_text=None)
    fields |= config
    write_adapter(folder, fields, embeddings, heads, safe_serialization=safe_serialization)


def load_prompt(name_or_folder: str | Path | Source, width: int | None = None) -> Prompt:
    """Reads a prompt that fastprefix or PEFT wrote.

    Args:
        name_or_folder: a folder, or a repository name on the Hugging Face hub.
        width: the width of the model's embeddings; not checked if None.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files hold no prompt of input embeddings, or none for this model; or a
            number is not finite.
    """
    files = read_adapter(name_or_folder, (*PROMPT_KINDS, INFIX_KIND))
    config, rows = files.config, files.embeddings.shape[0]
    P = config.get("num_virtual_tokens") or rows
    copies = config.get("num_transformer_submodules") or 1
    if P * copies != rows:
        raise ValueError(
            f"{files.config_file}: got num_virtual_tokens {P} for {copies} of them, takes "
            f"{rows // copies} as {files.weights_file.name} has {rows} rows"
        )
    if width is not None and files.embeddings.shape[1] != width:
        raise ValueError(
            f"{files.weights_file}: got embeddings {files.embeddings.shape[1]} wide, takes "
            f"{width} for this model"
        )
    return Prompt(files.embeddings[:P], config, files.heads)
