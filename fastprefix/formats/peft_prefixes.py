"""Prefixes in the format of PEFT's PREFIX_TUNING and CARTRIDGE adapters.

PEFT stores the prefix as ``prompt_embeddings`` [P, layers · 2 · Hkv · D]. It does not save an MLP.
A cartridge differs only in its configuration. This format can hold a prefix if

- all layers have the same number of heads, the same length, and the same size of keys and values,
- the text starts at position P,
- heads have no biases or gates,
- in an encoder-decoder, only the decoder's self-attention has a prefix,
- layers that use the text's keys and values of another layer (Gemma 3n) have that layer's prefix.
  In PEFT they see that one, whatever is stored for them.

Any other prefix goes into a :class:`PrefixKV` file. Its adapter_config.json has a peft_type that
PEFT does not know, so PEFT refuses the folder instead of computing something else.
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
    """What a prefix's folder holds.

    Attributes:
        kv: the prefix.
        config: the fields of adapter_config.json.
        heads: see :class:`fastprefix.formats.peft_files.AdapterFiles`.
    """

    kv: PrefixKV
    config: dict[str, Any]
    heads: dict[str, Tensor] = field(default_factory=dict)


def refusal(
    kv: PrefixKV, groups: Sequence[Group] | None = None, sources: Sequence[int] | None = None
) -> str | None:
    """Why PEFT's format cannot hold a prefix; None if it can.

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

    If PEFT's format cannot hold the prefix, only ours can load it; see the top of this module. The
    configuration then gives the reason as ``not_peft``.

    Args:
        folder: created if it does not exist; files of these names in it are replaced.
        kv: the prefix.
        config: fields of PEFT's PrefixTuningConfig or CartridgeConfig that do not follow from the
            prefix (task_type, prefix_projection, num_frozen_tokens, base_model_name_or_path).
        kind: "PREFIX_TUNING" or "CARTRIDGE".
        heads: see :class:`Adapter`.
        groups: which part of the model each layer belongs to; one stack if None.
        sources: see :class:`fastprefix.hf.patch.patch.Patch`; each layer's own if None.
        safe_serialization: see :func:`fastprefix.formats.peft_files.write_adapter`.

    Raises:
        OSError: the files cannot be written.
        ValueError: the kind is unknown.
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
        # PEFT's configuration for this kind has no such field
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

    PEFT puts a prefix into the cache, so it slides out of a model's sliding windows as a text
    would. A prefix that PEFT trained therefore gets ``in_window=True``.

    Args:
        name_or_folder: a folder, or a repository name on the Hugging Face hub.
        shapes: the shapes of the model's layers; those of the configuration if None.
        groups: which part of the model each layer belongs to; one stack if None.
        sources: see :class:`fastprefix.hf.patch.patch.Patch`; each layer's own if None.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files hold no prefix, or none for this model; or a number is not finite.
    """
    config, config_file = read_config(name_or_folder, (*PREFIX_KINDS, OWN_KIND))
    if config["peft_type"] == OWN_KIND:
        kv = PrefixKV.load(find(name_or_folder, KV_FILE))
        if shapes is not None and kv.shapes != tuple(shapes):
            raise ValueError(
                f"{find(name_or_folder, KV_FILE)}: got layers of {_short(kv.shapes)}, takes "
                f"{_short(shapes)} for this model"
            )
        config, heads = read_heads(name_or_folder, (OWN_KIND,))
        return Adapter(kv, config, heads)
    files = read_adapter(name_or_folder, PREFIX_KINDS)
    config = files.config
    submodules = config.get("num_transformer_submodules") or 1
    decoder = _decoder(groups)
    if submodules != (1 if decoder is None else 2):
        raise ValueError(
            f"{config_file}: got num_transformer_submodules {submodules}, takes 1, or 2 for an "
            "encoder-decoder model, whose layers must be known"
        )
    if shapes is None:
        shapes = _shapes(files)
    first = shapes[decoder[0] if decoder is not None else 0]
    # for an encoder-decoder, PEFT stores as many layers as the encoder has; see _unfolded
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
    """The layers of a decoder's self-attention; None if the model is a single stack."""
    if groups is None or len(set(groups)) == 1:
        return None
    return [layer for layer, group in enumerate(groups) if group == "decoder"]


def _as_seen(kv: PrefixKV, sources: Sequence[int]) -> PrefixKV:
    """The prefix that each layer sees in PEFT's cache: that of the layer whose keys it uses."""
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
    """The part of a prefix that PEFT gives to the decoder of an encoder-decoder.

    The prefix has N layers, as many as the encoder. ``PeftModel.get_prompt`` repeats them once and
    forms pairs of layers. The first of a pair is for the decoder's self-attention. The second is
    for its attention to the encoder, and PEFT drops it. So layer i of the decoder gets layer
    2 · i mod N. With an even N, half of the prefix is never used.
    """
    return kv.select([2 * layer % kv.num_layers for layer in range(num_layers)])


def _folded(kv: PrefixKV) -> PrefixKV:
    """The inverse of :func:`_unfolded`, with an odd N, so that 2 · i mod N has every value."""
    N = kv.num_layers + (kv.num_layers + 1) % 2
    P, places = kv.num_virtual_tokens, [2 * layer % N for layer in range(kv.num_layers)]
    spread = kv.spread(places, kv.shapes[:1] * N)
    keys, values = (
        tuple(t if t.shape[1] else t.new_zeros(t.shape[0], P, t.shape[2]) for t in tensors)
        for tensors in (spread.keys, spread.values)
    )
    return replace(kv, keys=keys, values=values)


def _common(kv: PrefixKV) -> dict[str, Any]:
    """The fields that every adapter_config.json has."""
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
    """The shapes of layers that PEFT's configuration gives."""
    names = ("num_layers", "num_attention_heads", "token_dim")
    given = [files.config.get(name) for name in names]
    for name, value in zip(names, given, strict=True):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{files.config_file}: got {name} {value!r}, takes 1 or more")
    layers, heads, width = given
    assert layers is not None
    assert heads is not None
    assert width is not None
    if 2 * layers * width != files.embeddings.shape[1] or width % heads:
        raise ValueError(
            f"{files.config_file}: got num_layers {layers}, num_attention_heads {heads} and "
            f"token_dim {width}, takes those of {files.embeddings.shape[1]} numbers a token"
        )
    return (LayerShape(heads, width // heads, width // heads),) * layers


def _short(shapes: Sequence[LayerShape]) -> str:
    """Shapes in short form, for messages."""
    distinct = sorted({(shape.num_heads, shape.key_size, shape.value_size) for shape in shapes})
    return f"{len(shapes)} layers of (heads, key size, value size) {distinct}"
