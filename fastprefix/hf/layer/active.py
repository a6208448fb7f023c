"""What travels with a forward call: the active prefix, or a recorder of what layers receive."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastprefix.attention.step import Step
from fastprefix.hf.multimodal import OuterInputs
from fastprefix.kv import PackedPrefixKV, PrefixKV


@dataclass(frozen=True, eq=False)
class ActivePrefix:
    """What travels with a forward call, as its keyword argument ``fastprefix``.

    Attributes:
        kv: the prefix; or several packed ones, of which each row has at most one; or None for plain
            attention.
        backend: the backend argument of :func:`fastprefix.prefix_attention`.
        prefix_index: with several prefixes, int32 [R]: which of them each row attends to, -1 for
            none. The hook makes it [B].
        prefix_ids: prefix_index before the hook, as R numbers on the host.
        positioned: whether the call's position_ids are already moved behind the prefix. Until they
            are, modules attend without it: these are the towers of a model that sees.
        outer_inputs: what the caller passed to the model around the language model.
        cu_seqlens: offsets [M + 1] of sequences packed in one row. They replace any mask.
        placement: how a windowed layer with an explicit mask learns how far a prompt slid. "end":
            its keys end at the newest token, and text_mask says which are real. "mask": its mask
            says both (a static cache, packed sequences). "unknown": the mask is the user's own.
        text_mask: the call's attention mask [B, L] up to the newest token, 1 = real token; None
            without padding.
        prefix_bias: [Hq, Lq, P], added to the prefix's scores in decoder self-attention.
        turn: where layers share a module, how many calls of that module in this forward came
            before. Where a module attends several times whenever it runs, each of these counts.
        attended: a list of one number: how often the module has attended in its current run; None
            for a module that attends once.
        turns: for each module that several layers share, by id, how often it has run.
        step: what the layers share in this forward call, made anew by the hook; None: nothing, as
            under torch.compile.
        moved: prefixes of layers on other devices, by tensor and device. They stay there as long
            as this prefix is active.
        masses: where layers leave the share of the attention that falls on the prefix: [B, Hq, Lq]
            by slot; None if nobody wants to know.
    """

    kv: PrefixKV | PackedPrefixKV | None
    backend: str = "auto"
    prefix_index: Tensor | None = None
    prefix_ids: tuple[int, ...] = ()
    positioned: bool = False
    outer_inputs: OuterInputs | None = None
    cu_seqlens: Tensor | None = None
    placement: Literal["end", "mask", "unknown"] = "end"
    text_mask: Tensor | None = None
    prefix_bias: Tensor | None = None
    turn: int = 0
    attended: list[int] | None = None
    turns: dict[int, int] = field(default_factory=dict)
    step: Step | None = None
    moved: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masses: dict[int, Tensor] | None = None

    def integers_on(self, tensor: Tensor, device: torch.device) -> Tensor:
        """prefix_index and the like on a layer's device, moved once in a step."""
        return tensor.to(device) if self.step is None else self.step.on(tensor, device)

    def prefix_for(self, tensor: Tensor, query: Tensor) -> Tensor:
        """A layer's prefix in the query's dtype and on its device, moved once unless it learns."""
        if tensor.device == query.device or self.step is None or not _keeps_values(tensor):
            return tensor.to(query.device, query.dtype)
        key = (id(tensor), tensor._version, query.device, query.dtype)
        if key not in self.moved:
            self.moved[key] = tensor, tensor.to(query.device, query.dtype)
        return self.moved[key][1]


def _keeps_values(tensor: Tensor) -> bool:
    """Whether a copy of a tensor serves until the tensor's version changes."""
    if tensor.requires_grad or tensor.is_inference() or torch.is_inference_mode_enabled():
        return False  # what is made in inference mode serves nothing else
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


@dataclass(eq=False)
class Recorder:
    """Travels like :class:`ActivePrefix`, and keeps what each attention layer receives.

    Attributes:
        modules: the attention modules in the order of their calls.
        keys: [B, Hkv, L, D] of each call.
        values: [B, Hkv, L, Dv] of each call.
        causal: whether each call was causal.
        queries: [B, Hq, D] of the last token of each call.
        windows: the sliding window of each call, or None.
        is_causal_given: the argument ``is_causal`` of each call.
        positions: the position_ids of the language model; None for its own default.
    """

    modules: list[nn.Module] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    causal: list[bool] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)
    is_causal_given: list[bool | None] = field(default_factory=list)
    positions: Tensor | None = None

    def record(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool,
        window: int | None = None,
        is_causal_given: bool | None = None,
    ) -> None:
        """Keeps one call."""
        self.is_causal_given.append(is_causal_given)
        self.modules.append(module)
        self.keys.append(key)
        self.values.append(value)
        self.causal.append(causal)
        self.queries.append(query[:, :, -1].clone())  # a view would keep all of them
        self.windows.append(window)

    def of_modules(self, modules: Collection[nn.Module]) -> Recorder:
        """What was kept of calls of these modules."""
        own = set(modules)
        calls = [call for call, module in enumerate(self.modules) if module in own]
        lists = ("modules", "keys", "values", "causal", "queries", "windows", "is_causal_given")
        parts: dict[str, Any] = {name: [getattr(self, name)[x] for x in calls] for name in lists}
        return Recorder(**parts, positions=self.positions)
