"""Prefixes in the format of PEFT's PREFIX_TUNING and CARTRIDGE adapters.

PEFT stores the prefix as ``prompt_embeddings`` [P, layers · 2 · Hkv · D]; an MLP is dropped when
the adapter is saved, and a cartridge differs by its configuration alone. One head number and size
for all layers, keys and values, and one length is all that this can hold, and text at once behind
the prefix, which no head reweights; of an encoder-decoder, the decoder's own attention. Layers that
see another layer's keys and values of the text (Gemma 3n) see that one's prefix, too, whatever is
stored for them. Any other prefix goes into a :class:`PrefixKV` file beside an adapter_config.json
with a peft_type that PEFT does not know, so that it refuses the folder rather than compute
something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprefix.files import written_together
from fastprefix.formats.peft_files import (
    AdapterFiles,
    find,
    read_adapter,
    read_config,
    read_heads,
    write_adapter,
)
from fastprefix.formats.source import Source
from fastprefix.kv import Group, LayerShape, PrefixKV
from fastprefix.kv.flat import to_flat, to_prefix_kv

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


def refusal(
    kv: PrefixKV, groups: Sequence[Group] | None = None, sources: Sequence[int] | None = None
) -> str | None:
    """Why PEFT's format cannot hold a prefix; None where it can.

    Args:
        kv: the prefix.
        groups: which part of the model each layer belongs to; one stack if None.
        sources: see :class:`fastprefix.hf.patch.patch.Patch`; each layer's own if None.
    """
    for layer, source in enumerate(sources or ()):
        if source < 0:
            return "its model attends several times over the same keys, with other values"
        same = torch.equal(kv.keys[layer], kv.keys[source])
        if not (same and torch.equal(kv.values[layer], kv.values[source])):
            return (
                f"layer {layer} sees the text's keys of layer {source}, and has another prefix "
                "than that"
            )
    if kv.reweighting is not None:
        return f"its query heads have a {kv.reweighting.kind} each"
    decoder = _decoder(groups)
    if groups is not None and decoder is not None:
        others = {g for g, key in zip(groups, kv.keys, strict=True) if key.shape[1]} - {"decoder"}
        if others:
            return f"it has a prefix in the {' and '.join(sorted(others))} layers"
        kv = kv.select(decoder)
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
    groups: Sequence[Group] | None = None,
    sources: Sequence[int] | None = None,
    safe_serialization: bool = True,
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
        groups: which part of the model each layer belongs to; one stack if None.
        sources: see :class:`fastprefix.hf.patch.patch.Patch`; each layer's own if None.
        safe_serialization: see :func:`fastprefix.formats.peft_files.write_adapter`.

    Raises:
        OSError: it cannot be written.
        ValueError: unknown kind.
    """
    if kind not in PREFIX_KINDS:
        raise ValueError(f"kind: got {kind!r}, takes one of {PREFIX_KINDS}")
    why_not = refusal(kv, groups, sources)
    if why_not is not None:
        fields = {**_common(kv), "peft_type": OWN_KIND, "not_peft": why_not, "kind": kind, **config}
        with written_together(folder) as partial:
            kv.save(partial / KV_FILE)
            write_adapter(partial, fields, None, heads, safe_serialization=safe_serialization)
        return
    submodules, decoder = 1, _decoder(groups)
    if decoder is not None:
        kv, submodules = _folded(kv.select(decoder)), 2
    shape = kv.shapes[0]
    fields = {
        **_common(kv),
        "num_attention_heads": shape.num_heads,
        "num_layers": kv.num_layers,
        "num_transformer_submodules": submodules,
        "peft_type": kind,
        "token_dim": shape.num_heads * shape.key_size,
    }
    about = {"in_window": kv.in_window}
    if kind == "CARTRIDGE":
        fields["num_frozen_tokens"] = 0
    else:
        fields.update(encoder_hidden_size=None, init_weights=None, prefix_projection=False)
        # of which PEFT's configuration for this kind has no field
        about["num_frozen_tokens"] = config.get("num_frozen_tokens", 0)
        config = {name: value for name, value in config.items() if name != "num_frozen_tokens"}
    fields |= config
    write_adapter(folder, fields, to_flat(kv), heads, about, safe_serialization=safe_serialization)


def load_adapter(
    name_or_folder: str | Path | Source,
    shapes: Sequence[LayerShape] | None = None,
    groups: Sequence[Group] | None = None,
    sources: Sequence[int] | None = None,
) -> Adapter:
    """Reads a prefix that fastprefix or PEFT wrote.

    PEFT puts a prefix into the cache, so that it slides out of a model's sliding windows as a
    text would: what PEFT trained is loaded with ``in_window=True``.

    Args:
        name_or_folder: a folder, or a repository name on the Hugging Face hub.
        shapes: what the model's layers take; as the configuration says if None.
        groups: which part of the model each layer belongs to; one stack if None.
        sources: see :class:`fastprefix.hf.patch.patch.Patch`; each layer's own if None.

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
        config, heads = read_heads(name_or_folder, (OWN_KIND,))
        return Adapter(kv, config, heads)
    files = read_adapter(name_or_folder, PREFIX_KINDS)
    config = files.config
    told = config.get("num_transformer_submodules") or 1
    decoder = _decoder(groups)
    if told != (1 if decoder is None else 2):
        raise ValueError(
            f"{config_file}: got num_transformer_submodules {told}, takes 1, or 2 for an "
            "encoder-decoder model, whose layers must be known"
        )
    if shapes is None:
        shapes = _shapes(files)
    first = shapes[decoder[0] if decoder is not None else 0]
    # of an encoder-decoder, as many as its encoder has: see _unfolded
    layers = len(shapes) if decoder is None else files.embeddings.shape[1] // first.width
    for name, want in (
        ("num_layers", layers),
        ("num_attention_heads", first.num_heads),
        ("token_dim", first.num_heads * first.key_size),
        ("num_virtual_tokens", files.embeddings.shape[0]),
    ):
        got = config.get(name)
        if got is not None and got != want:
            raise ValueError(f"{config_file}: got {name} {got}, takes {want} for this model")
    if decoder is not None and layers < len(decoder):
        raise ValueError(
            f"{config_file}: got {layers} layers for a decoder of {len(decoder)}; PEFT, which "
            "counts the encoder's, cannot run it either"
        )
    try:
        kv = to_prefix_kv(files.embeddings, shapes if decoder is None else (first,) * layers)
    except ValueError as error:
        raise ValueError(f"{files.weights_file}: {error}") from error
    if decoder is not None:
        kv = _unfolded(kv, len(decoder)).spread(decoder, shapes)
    if sources is not None and list(sources) != list(range(kv.num_layers)):
        kv = _as_seen(kv, sources)
    slides = groups is None or set(groups) == {"decoder"}
    kv = replace(kv, in_window=bool(files.about.get("in_window", slides)))
    config.setdefault("num_frozen_tokens", files.about.get("num_frozen_tokens", 0))
    return Adapter(kv, config, files.heads)


def _decoder(groups: Sequence[Group] | None) -> list[int] | None:
    """The layers of a decoder's own attention; None where the model is a single stack."""
    if groups is None or len(set(groups)) == 1:
        return None
    return [layer for layer, group in enumerate(groups) if group == "decoder"]


def _as_seen(kv: PrefixKV, sources: Sequence[int]) -> PrefixKV:
    """What PEFT's cache shows each layer: the prefix of the layer that made the text's keys."""
    places = [layer if source < 0 else source for layer, source in enumerate(sources)]
    keys, values = (
        tuple(
            tensors[place] if place == layer else tensors[place].clone()
            for layer, place in enumerate(places)
        )
        for tensors in (kv.keys, kv.values)
    )
    return replace(kv, keys=keys, values=values)


def _unfolded(kv: PrefixKV, num_layers: int) -> PrefixKV:
    """What PEFT feeds an encoder-decoder's decoder out of a prefix of the encoder's depth N.

    ``PeftModel.get_prompt`` doubles the layers, cuts them in pairs of layers, and of each pair the
    first is the decoder's own attention, the second that to the encoder, which it then throws away.
    So layer i of the decoder gets layer 2 · i mod N: an even N leaves half of the prefix dead.
    """
    return kv.select([2 * layer % kv.num_layers for layer in range(num_layers)])


def _folded(kv: PrefixKV) -> PrefixKV:
    """The inverse of :func:`_unfolded`: an odd N, for which 2 · i mod N takes every value."""
    N = kv.num_layers + (kv.num_layers + 1) % 2
    P, places = kv.num_virtual_tokens, [2 * layer % N for layer in range(kv.num_layers)]
    spread = kv.spread(places, kv.shapes[:1] * N)
    keys, values = (
        tuple(t if t.shape[1] else t.new_zeros(t.shape[0], P, t.shape[2]) for t in tensors)
        for tensors in (spread.keys, spread.values)
    )
    return replace(kv, keys=keys, values=values)


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
    if 2 * layers * width != files.embeddings.shape[1] or width % heads:
        raise ValueError(
            f"{files.config_file}: got num_layers {layers}, num_attention_heads {heads} and "
            f"token_dim {width}, takes those of {files.embeddings.shape[1]} numbers a token"
        )
    return (LayerShape(heads, width // heads, width // heads),) * layers


def _told(shapes: Sequence[LayerShape]) -> str:
    """Shapes in few words, for messages."""
    distinct = sorted({(shape.num_heads, shape.key_size, shape.value_size) for shape in shapes})
    return f"{len(shapes)} layers of (heads, key size, value size) {distinct}"
