"""What the keyword arguments of a call say about its rows and its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.layer.active import ActivePrefix
from fastprefix.hf.layer.packing import inputs_of
from fastprefix.hf.multimodal import OuterInputs
from fastprefix.hf.versions import cache_of, length_of
from fastprefix.kv import PackedPrefixKV


@dataclass(eq=False)
class StackCall:
    """One call of a stack.

    Attributes:
        module: the stack, or the model around it.
        names: parameters of its forward.
        kwargs: of the call; changed in place.
        active: the prefix of the call.
        cu_seqlens: offsets of packed sequences, int32 [M + 1].
        index: which of several prefixes each row or packed sequence attends to, [B] or [M].
        offset: by how much the text moves: one number, [B, 1] by row, or [1, L] by token.
        prefix_bias: see :class:`fastprefix.hf.layer.active.ActivePrefix`.
    """

    module: Any
    names: tuple[str, ...]
    kwargs: dict[str, Any]
    active: ActivePrefix
    cu_seqlens: Tensor | None = None
    index: Tensor | None = None
    offset: int | Tensor = 0
    prefix_bias: Tensor | None = None

    @property
    def most(self) -> int:
        """By how much the text of any row moves at most."""
        return 0 if self.active.kv is None else self.active.kv.position_offset

    @property
    def kind(self) -> str:
        """The module's class, for messages."""
        return type(self.module).__name__


def rows_and_offsets(
    active: ActivePrefix, module: nn.Module, kwargs: dict[str, Any], cu_seqlens: Tensor | None
) -> tuple[Tensor | None, int | Tensor]:
    """Which prefix each row or packed sequence attends to, and by how much it moves the text.

    Args:
        active: of the call.
        module: the stack.
        kwargs: of the call.
        cu_seqlens: offsets of packed sequences; None without.

    Returns:
        The index of a prefix, [B] by row or [M] by packed sequence, and the offset, [B, 1] by row
        or [1, L] by token of the packed row. With a single prefix None and a number.

    Raises:
        ValueError: the names of the prefixes do not fit the rows.
    """
    if not isinstance(active.kv, PackedPrefixKV):
        assert active.kv is not None
        return None, active.kv.position_offset
    names = ("input_ids", "inputs_embeds", getattr(module, "main_input_name", ""))
    sizes = [kwargs[name].shape[0] for name in names if kwargs.get(name) is not None]
    what = "rows, or for each group of them that generate() makes of a row"
    if cu_seqlens is not None:
        sizes, what = [cu_seqlens.shape[0] - 1], "packed sequences"
    index = active.prefix_index
    R = 0 if index is None else index.shape[0]
    B = sizes[0] if sizes else 0
    if index is None or B % R != 0 or (cu_seqlens is not None and B != R):
        raise ValueError(f"rows: got {R} names, takes one for each of the batch's {B} {what}")
    if B != R:
        index = index.repeat_interleave(B // R, output_size=B)
    if active.kv.position_offset == 0:
        return index, 0
    offsets = active.kv.position_offsets[index]
    if cu_seqlens is None:
        return index, offsets[:, None]
    tokens = inputs_of(kwargs).shape[1]
    return index, offsets.repeat_interleave(cu_seqlens.diff(), output_size=tokens)[None]


def check_lengths(kwargs: dict[str, Any], offset: int) -> None:
    """Checks that masks and positions cover the text only, and do not count the prefix.

    A caller that is used to a prefix in the cache might count it. What is known on the device only
    (a static cache's length) is not waited for.

    Raises:
        ValueError: one of them counts the prefix.
    """
    given = (kwargs.get(name) for name in ("input_ids", "inputs_embeds"))
    text = next((x for x in given if _is_text(x)), None)
    if text is None:
        return
    B, L = text.shape[:2]
    cache, compiling = cache_of(kwargs), torch.compiler.is_compiling()
    seen = length_of(cache)
    if isinstance(seen, Tensor):
        seen = int(seen) if seen.device.type == "cpu" and not compiling else None
    encoded: Tensor | None = kwargs.get("encoder_hidden_states")
    limits = {
        "attention_mask": None if seen is None else seen + L,
        "encoder_attention_mask": None if encoded is None else encoded.shape[1],
        "token_type_ids": L,
        "position_ids": L,
    }
    for name, most in limits.items():
        x = kwargs.get(name)
        if most is None or not isinstance(x, Tensor) or x.shape[-1] <= most:
            continue
        if x.dim() == 2 or name == "position_ids":
            raise ValueError(
                f"{name}: got shape {list(x.shape)}, takes [B, L] = {[B, most]}, that of the text "
                "alone (and of what is in the cache): the prefix is not part of it"
            )
    positions = kwargs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or not offset or compiling:
        return
    # generate() makes positions of the mask first, and then drops a mask that is all ones
    on_host = positions.device.type == "cpu" or cache is not None
    if not on_host or seen is None or (L == 1 and seen > 0):
        return
    behind = seen + offset
    if bool((positions.amin(-1) == behind).any()):
        raise ValueError(
            f"attention_mask, position_ids: got positions from {behind} on, takes those of the "
            f"text alone, from 0 (here {seen}): an attention_mask counts no prefix, nor do "
            f"position_ids, which are moved behind its {offset} tokens"
        )


def _is_text(given: Any) -> bool:
    return isinstance(given, Tensor) and given.dim() in (2, 3)


def prompt_lengths(active: ActivePrefix) -> list[int]:
    """How many positions each prompt takes, among the prefixes that the rows of a call have."""
    kv = active.kv
    if isinstance(kv, PackedPrefixKV):
        used = {n for n in active.prefix_ids if n >= 0 and kv.windowed[n]}
        return [kv.offsets[n] for n in used]
    return [] if kv is None else [kv.position_offset]


def reach_of(kwargs: dict[str, Any]) -> int:
    """Upper bound on the positions that the text takes, cached tokens included."""
    length = inputs_of(kwargs).shape[1]
    seen = length_of(cache_of(kwargs))
    return length + (seen if isinstance(seen, int) else 0)  # a static cache keeps a tensor


def place_of_text(
    kwargs: dict[str, Any], outer_inputs: OuterInputs | None = None
) -> dict[str, Any]:
    """Where the text is among the layers' keys: `placement` and `text_mask` of ActivePrefix."""
    attention_mask, cache = kwargs.get("attention_mask"), cache_of(kwargs)
    attention_mask = attention_mask if outer_inputs is None else outer_inputs.attention_mask
    if any(getattr(layer, "is_compileable", False) for layer in getattr(cache, "layers", ())):
        return {"placement": "mask"}
    if attention_mask is None:
        position_ids = kwargs.get("position_ids")
        if position_ids is not None and position_ids.dim() == 3:
            # the first of 4 axes counts the text's tokens; 3 axes are those of images
            position_ids = position_ids[0] if position_ids.shape[0] == 4 else None
        if position_ids is None or cache is not None or torch.compiler.is_compiling():
            return {}
        # positions that start again are packed sequences, to transformers as well
        packed = position_ids.shape[-1] > 1 and bool((position_ids.diff(dim=-1) != 1).any())
        return {"placement": "mask"} if packed else {}
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return {"placement": "unknown"}
    length = inputs_of(kwargs).shape[1]
    return {"text_mask": attention_mask[:, : length_of(cache) + length]}


def behind_prefix(
    kwargs: dict[str, Any],
    offset: int | Tensor,
    bare: Tensor | None = None,
    outer_inputs: OuterInputs | None = None,
) -> Tensor:
    """Positions of the text behind the prefix; pads take none.

    Explicit position_ids count the text from 0. Those of images come from the model and stay as
    they are. Without position_ids the positions follow the attention mask, as in generate(): pads
    between prefix and text must not push the text away.

    Args:
        kwargs: of the call.
        offset: a number, or [B, 1] by row, or [1, L] by token of packed sequences.
        bare: bool [B, 1]: rows without a prefix. They keep the positions of the bare model, which
            counts pads as well. None if there is no such row.
        outer_inputs: what the caller passed to the model around this one, if there is one.

    Returns:
        [B, L], or as many dimensions as the given position_ids have.
    """
    position_ids: Tensor | None = kwargs.get("position_ids")
    made = outer_inputs is not None and not outer_inputs.position_ids
    if position_ids is not None and (position_ids.dim() == 3 or not made):
        return position_ids + offset
    inputs = inputs_of(kwargs)
    length = inputs.shape[1]
    attention_mask = (
        kwargs.get("attention_mask") if outer_inputs is None else outer_inputs.attention_mask
    )
    seen = length_of(cache_of(kwargs))
    plain = positions = (torch.arange(length, device=inputs.device) + seen)[None]
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        positions = attention_mask.long().cumsum(-1).sub(1).clamp(min=0)[:, -length:]
        if bare is not None:
            positions = torch.where(bare, plain, positions)
    if position_ids is not None:
        # made by the outer model: they count pads, and from 1 in PaliGemma
        positions = positions + (position_ids - plain)
    # one row for each row of the batch, since some models index them (Qwen4-Exp)
    return (positions + offset).expand(inputs.shape[0], -1)
