"""Prefixes in the format of PEFT's PREFIX_TUNING and CARTRIDGE adapters.

PEFT stores the prefix as ``prompt_embeddings`` [P, layers · 2 · Hkv · D]; an MLP is dropped when
the adapter is saved, and a cartridge differs by its configuration alone. One head number and size
for all layers, keys and values, and one length is all that this can hold, and text at once behind
the prefix. Any other prefix goes into a :class:`PrefixKV` file of its own beside an
adapter_config.json with a peft_type that PEFT does not know, so that it refuses the folder rather
than compute something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastprefix.encoders.flat import to_flat, to_prefix_kv
from fastprefix.hf.peft_files import (
    AdapterFiles,
    find,
    read_adapter,
    read_config,
    read_heads,
    write_adapter,
)
from fastprefix.kv import LayerShape, PrefixKV

PREFIX_KINDS = ("PREFIX_TUNING", "CARTRIDGE")
OWN_KIND = "FASTPREFIX_KV"
KV_FILE = "prefix_kv.safetensors"


@dataclass(frozen=True)
class Adapter:
    """What a folder holds.

    Attributes:
        kv: the prefix.
        config: adapter_config.json.
        heads: what was trained of the base beside it, by the names of the base's ``state_dict``.
    """

    kv: PrefixKV
    config: dict[str, Any]
    heads: dict[str, Tensor] = field(default_factory=dict)


def refusal(kv: PrefixKV) -> str | None:
    """Why PEFT's format cannot hold a prefix; None where it can."""
    shape, P = kv.shapes[0], kv.num_virtual_tokens
    if any(other != shape for other in kv.shapes):
        return "its layers differ in the number or size of their heads"
    if shape.key_size != shape.value_size:
        return f"its keys are {shape.key_size} wide and its values {shape.value_size}"
    if any(key.shape[1] != P for key in kv.keys):
        return "its layers differ in length"
    if kv.position_offset != P:
        return f"the text behind its {P} tokens is at position {kv.position_offset}"
    return None


def save_adapter(
    folder: str | Path,
    kv: PrefixKV,
    config: dict[str, Any],
    *,
    kind: str = "PREFIX_TUNING",
    heads: dict[str, Tensor] | None = None,
) -> None:
    """Writes a prefix so that PEFT's ``PeftModel.from_pretrained`` and ours can load it.

    Where PEFT's format cannot hold the prefix, ours alone can: see the head of this module. The
    configuration then says why, as ``not_peft``.

    Args:
        folder: made if need be; files of these names in it are replaced.
        kv: the prefix.
        config: fields of PEFT's PrefixTuningConfig or CartridgeConfig that cannot be read off the
            prefix (task_type, prefix_projection, num_frozen_tokens, base_model_name_or_path).
        kind: "PREFIX_TUNING" or "CARTRIDGE".
        heads: see :class:`Adapter`.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in PREFIX_KINDS:
        raise ValueError(f"kind: got {kind!r}, takes one of {PREFIX_KINDS}")
    why_not = refusal(kv)
    if why_not is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        kv.save(Path(folder) / KV_FILE)
        fields = {**_common(kv), "peft_type": OWN_KIND, "not_peft": why_not, **config}
        write_adapter(folder, fields, None, heads)
        return
    shape = kv.shapes[0]
    fields = {
        **_common(kv),
        "num_attention_heads": shape.num_heads,
        "num_layers": kv.num_layers,
        "num_transformer_submodules": 1,
        "peft_type": kind,
        "token_dim": shape.num_heads * shape.key_size,
    }
    if kind == "CARTRIDGE":
        fields["num_frozen_tokens"] = 0
    else:
        fields.update(encoder_hidden_size=None, init_weights=None, prefix_projection=False)
    write_adapter(folder, {**fields, **config}, to_flat(kv), heads, {"in_window": kv.in_window})


def load_adapter(name_or_folder: str | Path, shapes: Sequence[LayerShape] | None = None) -> Adapter:
    """Reads a prefix that fastprefix or PEFT wrote.

    PEFT puts a prefix into the cache, so that it slides out of a model's sliding windows as a
    text would: what PEFT trained is loaded with ``in_window=True``.

    Args:
        name_or_folder: a folder, or a repository name on the Hugging Face hub.
        shapes: what the model's layers take; as the configuration says if None.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: not a prefix-tuning adapter, not one for this model, or not all finite.
    """
    config, config_file = read_config(name_or_folder, (*PREFIX_KINDS, OWN_KIND))
    if config["peft_type"] == OWN_KIND:
        kv = PrefixKV.load(find(name_or_folder, KV_FILE))
        if shapes is not None and kv.shapes != tuple(shapes):
            raise ValueError(
                f"{find(name_or_folder, KV_FILE)}: got layers of {_told(kv.shapes)}, takes "
                f"{_told(shapes)} for this model"
            )
        return Adapter(kv, config, read_heads(name_or_folder))
    files = read_adapter(name_or_folder, PREFIX_KINDS)
    if shapes is None:
        shapes = _shapes(files)
    for name, want in (
        ("num_layers", len(shapes)),
        ("num_attention_heads", shapes[0].num_heads),
        ("token_dim", shapes[0].num_heads * shapes[0].key_size),
        ("num_virtual_tokens", files.embeddings.shape[0]),
    ):
        got = config.get(name)
        if got is not None and got != want:
            raise ValueError(f"{config_file}: got {name} {got}, takes {want} for this model")
    try:
        kv = to_prefix_kv(files.embeddings, shapes)
    except ValueError as error:
        raise ValueError(f"{files.weights_file}: {error}") from error
    kv = replace(kv, in_window=bool(files.about.get("in_window", True)))
    return Adapter(kv, config, files.heads)


def _common(kv: PrefixKV) -> dict[str, Any]:
    """Fields that every adapter_config.json has."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "modules_to_save": None,
        "num_virtual_tokens": kv.num_virtual_tokens,
        "revision": None,
        "task_type": "CAUSAL_LM",
    }


def _shapes(files: AdapterFiles) -> tuple[LayerShape, ...]:
    """The layers' shapes as PEFT's configuration tells them."""
    names = ("num_layers", "num_attention_heads", "token_dim")
    told = [files.config.get(name) for name in names]
    for name, value in zip(names, told, strict=True):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{files.config_file}: got {name} {value!r}, takes 1 or more")
    layers, heads, width = told
    assert layers is not None
    assert heads is not None
    assert width is not None
    return (LayerShape(heads, width // heads, width // heads),) * layers


def _told(shapes: Sequence[LayerShape]) -> str:
    """Shapes in few words, for messages."""
    distinct = sorted({(shape.num_heads, shape.key_size, shape.value_size) for shape in shapes})
    return f"{len(shapes)} layers of (heads, key size, value size) {distinct}"
