"""What travels with a forward call: the active prefix, or a recorder of what layers are handed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from fastprefix.hf.multimodal import OuterInputs
from fastprefix.kv import PackedPrefixKV, PrefixKV


@dataclass(frozen=True, eq=False)
class ActivePrefix:
    """What travels with a forward call, as its keyword argument ``fastprefix``.

    Attributes:
        kv: the prefix, or several of which a row picks one, or None for plain attention.
        backend: of :func:`fastprefix.prefix_attention`.
        prefix_index: with several prefixes int32 [R], which of them a row attends to, -1 for none;
            the hook makes it [B].
        prefix_ids: the same before the hook, on the host: an R-tuple.
        positioned: whether the call's position_ids are already moved behind the prefix. Before
            that, in the towers of a model that sees, modules attend without it.
        outer_inputs: what the caller told the model around the language model.
        cu_seqlens: offsets [M + 1] of sequences packed in one row, which stand for any mask.
        placement: how a windowed layer with an explicit mask learns how far a prompt slid: "end",
            its keys end at the newest token and text_mask says which are real; "mask", its mask
            says both (a static cache, packed sequences); "unknown", the mask is the user's own.
        text_mask: the call's attention mask [B, L], 1 = real token, up to the newest token; None
            for no padding.
        prefix_bias: [Hq, Lq, P], added to the prefix's scores in a decoder's own attention.
        turn: how often the layers at hand ran before in this call, where layers share modules;
            times how often each attends where that is several times.
        attended: how often the module at hand has attended in this run of it, a list of one number;
            None where it does so once.
        turns: the same, counted for each module that several layers share.
        masses: where each layer leaves the share of its attention that the prefix takes, by slot,
            [B, Hq, Lq] each; None for not at all.
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
    masses: dict[int, Tensor] | None = None


@dataclass(eq=False)
class Recorder:
    """Travels like :class:`ActivePrefix`, and keeps what each attention layer was handed.

    Attributes:
        modules: the attention modules in the order of their calls.
        keys: [B, Hkv, L, D] of each call.
        values: [B, Hkv, L, Dv] of each call.
        causal: whether each call was causal.
        queries: [B, Hq, D] of the last token of each call.
        windows: the sliding window of each call, or None.
        is_causal_given: the argument ``is_causal`` of each call.
        positions: what the language model was told, None for its own default.
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
