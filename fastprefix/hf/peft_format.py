"""Prefix-tuning adapters in PEFT's own format: adapter_config.json, adapter_model.safetensors.

PEFT stores the prefix as ``prompt_embeddings`` [P, layers · 2 · Hkv · D]; an MLP is dropped when
the adapter is saved. What PEFT has no field for goes into the safetensors metadata, which PEFT
ignores.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastprefix.encoders.flat import to_flat, to_prefix_kv
from fastprefix.kv import LayerShape, PrefixKV

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_TENSOR = "prompt_embeddings"
_METADATA = "fastprefix"


@dataclass(frozen=True)
class Adapter:
    """What a folder holds: the prefix, and PEFT's configuration of it as a dict."""

    kv: PrefixKV
    config: dict[str, Any]


def save_adapter(folder: str | Path, kv: PrefixKV, config: dict[str, Any]) -> None:
    """Writes a prefix so that PEFT's ``PeftModel.from_pretrained`` and ours can load it.

    Args:
        folder: made if need be; files of these names in it are replaced.
        kv: the prefix.
        config: fields of PEFT's PrefixTuningConfig that cannot be read off the prefix
            (task_type, prefix_projection, encoder_hidden_size, base_model_name_or_path).

    Raises:
        ValueError: the layers' shapes differ, which PEFT's format cannot hold.
    """
    shape = kv.shapes[0]
    if any(other != shape for other in kv.shapes) or shape.key_size != shape.value_size:
        raise ValueError(
            "kv: PEFT's format holds one head number and size for all layers, keys and values; "
            "save this prefix with PrefixKV.save"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "encoder_hidden_size": None,
        "inference_mode": True,
        "init_weights": None,
        "modules_to_save": None,
        "num_attention_heads": shape.num_heads,
        "num_layers": kv.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": kv.num_virtual_tokens,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": shape.num_heads * shape.key_size,
    }
    fields.update(config)
    weights = {_TENSOR: to_flat(kv).detach().cpu().contiguous()}
    about = {"format": "pt", _METADATA: json.dumps({"position_offset": kv.position_offset})}
    # both files whole before either takes its name
    partial_weights = folder / f"{WEIGHTS_FILE}.partial"
    partial_config = folder / f"{CONFIG_FILE}.partial"
    save_file(weights, partial_weights, metadata=about)
    partial_config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    partial_weights.replace(folder / WEIGHTS_FILE)
    partial_config.replace(folder / CONFIG_FILE)


def load_adapter(name_or_folder: str | Path, shapes: tuple[LayerShape, ...]) -> Adapter:
    """Reads a prefix-tuning adapter that fastprefix or PEFT wrote.

    Args:
        name_or_folder: a folder, or a repository name on the Hugging Face hub.
        shapes: what the model's layers take.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: not a prefix-tuning adapter, not one for this model, or not all finite.
    """
    config_file = _find(name_or_folder, CONFIG_FILE)
    weights_file = _find(name_or_folder, WEIGHTS_FILE)
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{config_file}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_file}: got a JSON {type(config).__name__}, takes an object")
    kind = config.get("peft_type")
    if kind != "PREFIX_TUNING":
        raise ValueError(f"{config_file}: got peft_type {kind!r}, takes 'PREFIX_TUNING'")
    try:
        with safe_open(weights_file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if list(opened.keys()) != [_TENSOR]:
                raise ValueError(f"got tensors {list(opened.keys())}, takes {_TENSOR!r} alone")
            flat = opened.get_tensor(_TENSOR)
            if flat.dim() != 2 or not flat.is_floating_point():
                raise ValueError(
                    f"got {flat.dtype} {_TENSOR} of shape {list(flat.shape)}, takes floating-point "
                    "[num_virtual_tokens, width]"
                )
    except Exception as error:
        raise ValueError(f"{weights_file}: {error}") from error
    for field, want in (
        ("num_layers", len(shapes)),
        ("num_attention_heads", shapes[0].num_heads),
        ("token_dim", shapes[0].num_heads * shapes[0].key_size),
        ("num_virtual_tokens", flat.shape[0]),
    ):
        got = config.get(field)
        if got is not None and got != want:
            raise ValueError(f"{config_file}: got {field} {got}, takes {want} for this model")
    if not torch.isfinite(flat).all():
        raise ValueError(f"{weights_file}: {_TENSOR} holds a NaN or infinity")
    try:
        offset = json.loads(metadata.get(_METADATA, "{}")).get("position_offset")
        kv = to_prefix_kv(flat, shapes, offset)
    except ValueError as error:
        raise ValueError(f"{weights_file}: {error}") from error
    return Adapter(kv, config)


def _find(name_or_folder: str | Path, file: str) -> Path:
    folder = Path(name_or_folder)
    if folder.is_dir():
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: no {file} in this folder")
        return path
    if folder.is_absolute() or str(name_or_folder).count("/") > 1:
        raise FileNotFoundError(f"{name_or_folder}: no such folder")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(name_or_folder), file))
