"""The ways to tell a stack of layers (a decoder, an encoder) where its text stands.

Each class is one way. The hook of a patched model calls ``place`` for each call of a stack, with
the keyword arguments of that call. It finds the rows and the packed sequences, and moves the text
behind the prefix.
"""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprefix.attention.step import Step
from fastprefix.hf.layer.active import ActivePrefix, Recorder
from fastprefix.hf.layer.packing import inputs_of, refuse_packed, unpack
from fastprefix.hf.multimodal import OuterInputs
from fastprefix.hf.patch.calls import (
    StackCall,
    behind_prefix,
    check_lengths,
    place_of_text,
    prompt_lengths,
    reach_of,
    rows_and_offsets,
)
from fastprefix.hf.patch.frequencies import check_dropped_cache, check_frequencies
from fastprefix.hf.patch.position_limit import check_position_limit
from fastprefix.hf.versions import by_name, cache_of, cached_name, length_of, parameters
from fastprefix.kv import PrefixKV

# By how much the running stack moves its text, by the key of its `ByEmbedding`: at most, by row.
_OFFSETS = threading.local()


@dataclass(frozen=True)
class Placing:
    """One way to tell a stack where its text stands; by itself it moves nothing."""

    # Whether prefixes may have a position_offset other than 0.
    can_move = False
    # Whether a learned prefix moves the text unless the user says otherwise.
    moves_by_default = False
    # Whether the caller must pass position_ids for the text to be moved.
    wants_position_ids = False

    def forget(self) -> None:
        """Forgets what a call that failed has left."""

    def record(
        self,
        recorder: Recorder,
        names: tuple[str, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Notes the position_ids of a call in the recorder."""

    def place(self, call: StackCall) -> ActivePrefix:
        """Finds the rows and packed sequences of a call, and moves its text behind the prefix."""
        kv = call.active.kv
        assert kv is not None
        call.cu_seqlens = self._unpacked(call)
        placed_text = place_of_text(call.kwargs, call.active.outer_inputs) if kv.in_window else {}
        call.index, call.offset = rows_and_offsets(
            call.active, call.module, call.kwargs, call.cu_seqlens
        )
        self._move(call)
        # new turns and a new step for each call: several calls may come before one backward
        return replace(
            call.active,
            positioned=True,
            prefix_index=call.index,
            cu_seqlens=call.cu_seqlens,
            prefix_bias=call.prefix_bias,
            turns={},
            step=None if torch.compiler.is_compiling() else Step(),
            **placed_text,
        )

    def _unpacked(self, call: StackCall) -> Tensor | None:
        """Offsets of packed sequences, or None; refuses masks that count the prefix."""
        check_lengths(call.kwargs, call.most)
        refuse_packed(call.module, call.kwargs)
        return None

    def _move(self, call: StackCall) -> None:
        """Moves the text of a call behind its prefix."""


@dataclass(frozen=True)
class _ByArgument(Placing):
    """By an argument of the forward.

    Attributes:
        limit: how many positions the stack has learned; None where it has learned none.
        counts_padding: whether the stack, bare, gives pads positions.
        frequencies: at which lengths its rotary embeddings change.
    """

    limit: int | None = None
    counts_padding: bool = True
    frequencies: tuple[tuple[str, int], ...] = ()

    can_move = True

    def _move(self, call: StackCall) -> None:
        bare = None
        if call.index is not None and call.cu_seqlens is None and self.counts_padding:
            bare = (call.index < 0)[:, None]
        positions = behind_prefix(call.kwargs, call.offset, bare, call.active.outer_inputs)
        call.kwargs["position_ids"] = positions
        reach = reach_of(call.kwargs) + call.most
        check_position_limit(self.limit, call.most, reach, positions)
        if self.frequencies and call.active.kv is not None and call.active.kv.in_window:
            check_frequencies(self.frequencies, prompt_lengths(call.active), reach, positions)


@dataclass(frozen=True)
class ByPositionIds(_ByArgument):
    """By position_ids. If the caller gives none, they follow the attention mask."""

    moves_by_default = True

    def record(
        self,
        recorder: Recorder,
        names: tuple[str, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """See :class:`Placing`."""
        recorder.positions = by_name(names, args, kwargs).get("position_ids")

    def _unpacked(self, call: StackCall) -> Tensor | None:
        if self.frequencies:
            check_dropped_cache(call.module, call.kwargs)
        check_lengths(call.kwargs, call.most)
        return unpack(call.module.config, call.kwargs, call.names)


@dataclass(frozen=True)
class ByGivenPositionIds(_ByArgument):
    """By position_ids. For learned positions the model has a default that only it knows."""

    wants_position_ids = True

    def _move(self, call: StackCall) -> None:
        # Rotary embeddings look at distances only. Pads between prefix and text must not add to
        # them (ModernBERT), so positions are always given. Learned positions stay the model's own
        # affair until a prefix moves them, and then the caller has to pass them.
        if self.limit is not None:
            if not call.most:
                return
            if call.kwargs.get("position_ids") is None:
                raise ValueError(
                    f"position_offset: got {call.most}, for which {call.kind} takes position_ids: "
                    "it alone knows its default"
                )
        super()._move(call)


@dataclass(frozen=True)
class ByEmbedding(Placing):
    """By the position embedding, which is told how many keys are in the cache.

    The embedding has a hook of its own, :func:`shift`, which runs later in the same call.

    Attributes:
        limit: how many positions the stack has learned; None for any.
        key: names the stack in `_OFFSETS`.
    """

    limit: int | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    can_move = moves_by_default = True

    def forget(self) -> None:
        """See :class:`Placing`."""
        setattr(_OFFSETS, self.key, (0, 0))

    def _move(self, call: StackCall) -> None:
        kv = call.active.kv
        if kv is not None and kv.in_window and call.kwargs.get("position_ids") is not None:
            raise NotImplementedError(
                f"position_ids: {call.kind} counts from another number than 0 where it "
                "is left to itself, and a prompt's keys stand where it does so: call it without "
                "position_ids. generate() makes some, from 0: put the prompt into input_ids"
            )
        setattr(_OFFSETS, self.key, (call.most, call.offset))

    def take_offset(self) -> tuple[int, int | Tensor]:
        """By how much the running call moves its text, at most and by row. Can be read once."""
        found: tuple[int, int | Tensor] = getattr(_OFFSETS, self.key, (0, 0))
        if found[0]:
            setattr(_OFFSETS, self.key, (0, 0))  # it is for the stack's own call only
        return found


def shift(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    names: tuple[str, ...],
    placing: ByEmbedding,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of a position embedding: the prefix counts as keys in the cache, as in PEFT.

    Args:
        module: the embedding.
        args: of its forward.
        kwargs: of its forward.
        names: of the forward's parameters.
        placing: of the stack.
    """
    most, offset = placing.take_offset()
    if most == 0:
        return None
    kwargs = by_name(names, args, kwargs)
    if isinstance(offset, Tensor) and not {"inputs_embeds", "position_ids"} <= set(names):
        raise NotImplementedError(
            f"rows: {type(module).__name__} cannot be told of positions that differ by row; takes "
            "prefixes with a position_offset of 0"
        )
    argument = cached_name(module)
    cached = 0 if argument is None else kwargs.get(argument, 0)
    positions = _shifted(module, kwargs, names, cached, offset)
    reach: Any = 0
    if positions is None:
        assert argument is not None
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        reach = offset + cached + (inputs.shape[1] if isinstance(inputs, Tensor) else 0)
        kwargs[argument] = cached + offset
    else:
        kwargs["position_ids"] = positions
    check_position_limit(placing.limit, most, reach, positions)
    return (), kwargs


def _shifted(
    module: Any, kwargs: dict[str, Any], names: tuple[str, ...], cached: Any, offset: int | Tensor
) -> Tensor | None:
    """Moved position_ids; None if a larger number of cached keys moves the text."""
    positions: Tensor | None = kwargs.get("position_ids")
    if positions is not None:
        return positions + offset
    if "position_ids" in names and hasattr(module, "create_position_ids_from_input_ids"):
        # RoBERTa's positions leave padding out
        if kwargs.get("input_ids") is not None:
            return module.create_position_ids_from_input_ids(
                kwargs["input_ids"], module.padding_idx, cached + offset
            )
        made = module.create_position_ids_from_inputs_embeds(
            kwargs["inputs_embeds"], module.padding_idx
        )
        return made + cached + offset  # made without the cache's length
    if isinstance(offset, Tensor):
        # the module would slice its positions by one number, but rows differ (BERT)
        length = inputs_of(kwargs).shape[1]
        return torch.arange(length, device=offset.device) + cached + offset
    return None


@dataclass(frozen=True)
class ByDistance(Placing):
    """By biases of distances between tokens (T5), which are computed for the prefix as well."""

    can_move = True

    def _move(self, call: StackCall) -> None:
        if not call.most:
            return
        kv = call.active.kv
        if not isinstance(kv, PrefixKV):
            raise NotImplementedError(
                f"rows: {call.kind} makes a bias of distances, and of one distance for "
                "all rows; takes prefixes with a position_offset of 0"
            )
        tokens, seen = inputs_of(call.kwargs), length_of(cache_of(call.kwargs))
        maker: Any
        (maker,) = relative_biases(call.module)
        bias: Tensor = maker.compute_bias(
            tokens.shape[1],
            kv.num_virtual_tokens,
            device=tokens.device,
            past_seen_tokens=seen + kv.position_offset,
        )
        call.prefix_bias = bias[0]  # [Hq, Lq, P], as if the prefix began the text


@dataclass(frozen=True)
class Unmovable(Placing):
    """Not at all: the text stands where the model puts it."""


@dataclass(frozen=True)
class InParts(Placing):
    """A model around an encoder and a decoder, which are told themselves."""

    def place(self, call: StackCall) -> ActivePrefix:
        """Hands the prefix down as it is."""
        return call.active


@dataclass(frozen=True)
class InLanguageModel(Placing):
    """A model around a language model, which is told itself."""

    def place(self, call: StackCall) -> ActivePrefix:
        """Hands the prefix down, with what the caller passed to the outermost model."""
        active = call.active
        if active.outer_inputs is not None:
            return active
        return replace(active, outer_inputs=OuterInputs.of(call.kwargs))


def relative_biases(stack: nn.Module) -> list[nn.Module]:
    """The attention modules that make a bias of the distance between tokens (T5)."""
    return [
        module
        for module in stack.modules()
        if getattr(module, "has_relative_attention_bias", False) and hasattr(module, "compute_bias")
    ]


def position_embeddings(stack: nn.Module) -> list[nn.Module]:
    """The position embeddings that are told how many keys are in the cache."""
    return [module for module in stack.modules() if cached_name(module) is not None]


def placing_of_decoder(stack: nn.Module, limit: int | None) -> Placing:
    """How to tell the decoder of an encoder-decoder where its text stands."""
    if position_embeddings(stack):
        return ByEmbedding(limit)
    return ByDistance() if len(relative_biases(stack)) == 1 else Unmovable()


def placing_of(
    stack: PreTrainedModel,
    *,
    causal: bool,
    limit: int | None,
    frequencies: tuple[tuple[str, int], ...],
) -> Placing:
    """How to tell a model that is one stack where its text stands.

    Args:
        stack: the model, or the language model in it.
        causal: whether it is a decoder.
        limit: how many positions it has learned; None for any.
        frequencies: at which lengths its rotary embeddings change.
    """
    by_argument = "position_ids" in parameters(stack)
    facts = (limit, _counts_padding(stack), frequencies)
    if causal and by_argument and not _counts_itself(stack):
        return ByPositionIds(*facts)
    if position_embeddings(stack):
        return ByEmbedding(limit)
    return ByGivenPositionIds(*facts) if by_argument else Unmovable()


def _counts_itself(stack: nn.Module) -> bool:
    """Whether a stack counts positions in a way of its own, and not from 0 (RoBERTa)."""
    return any(hasattr(x, "create_position_ids_from_input_ids") for x in stack.modules())


def _counts_padding(stack: nn.Module) -> bool:
    """Whether pads take positions in a bare decoder that gets no position_ids.

    They take none if its position embedding reads the attention mask (OPT).
    """
    return not any(
        isinstance(module, nn.Embedding) and "attention_mask" in parameters(module)
        for module in stack.modules()
    )
