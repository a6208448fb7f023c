"""Checks that a prefix fits a patched model, and makes it ready to travel with a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from fastprefix.arguments import check_names
from fastprefix.hf.checking.check_prefix import check_prefix
from fastprefix.hf.devices import device_of, dtype_of
from fastprefix.hf.expand.hooks import check_expanded
from fastprefix.hf.layer.active import ActivePrefix
from fastprefix.hf.patch.patch import Patch, patch_of
from fastprefix.hf.states.cached_state import check_states
from fastprefix.kv import PackedPrefixKV, PrefixBank, PrefixKV

# One prefix for all rows, or several by name.
Prefixes = PrefixKV | PackedPrefixKV | Mapping[str, PrefixKV]


def activate(
    model: PreTrainedModel,
    kv: Prefixes | None,
    rows: Sequence[str | None] | None = None,
    *,
    check: bool = True,
) -> ActivePrefix:
    """What to hand to a patched model's forward as ``fastprefix=`` for one call with this prefix.

    Args:
        model: patched.
        kv: see :func:`fastprefix.use_prefix`.
        rows: see :func:`fastprefix.use_prefix`.
        check: whether to check, once per model, that each layer sees its own share.

    Raises:
        UnsupportedModelError: layers of the model do not see their own share of a prefix.
        TypeError: kv is not a PrefixKV, nor several by name, nor None.
        ValueError: the model is not patched or has no weights, kv does not fit its layers, or rows
            does not fit kv.
        NotImplementedError: kv is a prompt that the model cannot continue: its layers keep more of
            a text than kv contains, cannot start from what it contains, or see a text in chunks.
    """
    device, dtype = device_of(model), dtype_of(model)
    if device.type == "meta":
        raise ValueError(
            "model: its weights are on the meta device. FSDP's cpu_ram_efficient_loading puts them "
            "there and brings back what state_dict() holds, which of a tuned model is the adapter "
            "alone: switch it off"
        )
    patch = patch_of(model)
    if rows is not None:
        check_names("rows", rows, "a name, or None, for each row of the batch")
    if kv is None:
        if rows is not None:
            raise ValueError("rows: got names with no prefix, takes several by name as kv")
        return ActivePrefix(None, patch.backend)
    # converted once here, not in every layer
    if isinstance(kv, Mapping):
        # a bank loads only what the rows name: the rest may be on disk
        named = kv.select(rows) if isinstance(kv, PrefixBank) and rows is not None else kv
        fitting = {
            n: x.to(device, dtype) if isinstance(x, PrefixKV) else x for n, x in named.items()
        }
        kv = PackedPrefixKV.pack(fitting)
    if not isinstance(kv, (PrefixKV, PackedPrefixKV)):
        raise TypeError(
            f"kv: got {type(kv).__name__}, takes a PrefixKV, or several by name (a dict or a "
            "PackedPrefixKV)"
        )
    index: Tensor | None = None
    prefix_ids: tuple[int, ...] = ()
    if isinstance(kv, PackedPrefixKV):
        if rows is None:
            raise ValueError("rows: got None with several prefixes, takes a name for each row")
        index, prefix_ids = kv.index(rows).to(device), kv.prefix_ids(rows)
    elif rows is not None:
        raise ValueError("rows: got names with one PrefixKV, takes several by name as kv")
    _check_fits(model, patch, kv)
    if check:
        check_prefix(model)
    check_states(model, kv)
    kv = kv.to(device, dtype)
    kv = patch.sharding.narrow(kv) if patch.sharding else kv
    return ActivePrefix(kv, patch.backend, index, prefix_ids)


def _check_fits(model: PreTrainedModel, patch: Patch, kv: PrefixKV | PackedPrefixKV) -> None:
    """Refuses prefixes that the model's layers cannot take."""
    if kv.num_layers != len(patch.shapes):
        raise ValueError(
            f"kv: got a prefix of {kv.num_layers} layers, takes one of {len(patch.shapes)} "
            f"for this {type(model).__name__}"
        )
    for layer, (got, want) in enumerate(zip(kv.shapes, patch.shapes, strict=True)):
        if got != want:
            raise ValueError(f"kv: got {got} in layer {layer}, takes {want}")
    if patch.expanded is not None:
        check_expanded(model, kv, patch)
    for layer, (heads, wanted) in enumerate(zip(_heads(kv), patch.query_heads, strict=True)):
        if heads not in (0, wanted):
            raise ValueError(
                f"kv: got a reweighting of {heads} query heads in layer {layer}, takes {wanted}"
            )
    if kv.position_offset and not patch.placing.can_move:
        raise ValueError(
            f"position_offset: got {kv.position_offset}, takes 0 for this {type(model).__name__}, "
            "which cannot be told where its text stands"
        )
    if kv.in_window:
        if set(patch.groups) != {"decoder"}:
            raise ValueError(
                "in_window: got a prefilled prompt, takes a learned prefix for this "
                f"{type(model).__name__}; prompts slide in decoder-only models alone"
            )
        _refuse_chunks(model)


def _heads(kv: PrefixKV | PackedPrefixKV) -> tuple[int, ...]:
    """For each layer, how many query heads the prefix reweights; 0 for none."""
    if isinstance(kv, PackedPrefixKV):
        return kv.num_heads
    return kv.reweighting.num_heads if kv.reweighting is not None else (0,) * kv.num_layers


def _refuse_chunks(model: PreTrainedModel) -> None:
    """Refuses prompts in models with chunked attention, where a text's place matters as well."""
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if "chunked_attention" in layers:
        raise NotImplementedError(
            f"kv: {type(model).__name__} does not take a prompt's keys and values for its text, "
            "the text's place among its chunks matters as well; put the prompt into input_ids (a "
            "learned prefix is no text, and works)"
        )
