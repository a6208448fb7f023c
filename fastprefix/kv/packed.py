"""Several prefixes end to end, one copy of each, for batches whose rows have different prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastprefix.arguments import methods_refuse_unknown_arguments
from fastprefix.kv.prefix import PrefixKV
from fastprefix.kv.reweighting import Kind, kind_of
from fastprefix.kv.shapes import LayerShape
from fastprefix.kv.states import States, mapped


@methods_refuse_unknown_arguments
@dataclass(frozen=True, eq=False)
class PackedPrefixKV:
    """N prefixes end to end along P, layer by layer; :meth:`pack` makes them.

    Attributes:
        names: [N], the prefixes' names, in their order along P.
        keys: one [Hkv, P_1 + ... + P_N, D] tensor for each layer.
        values: one [Hkv, P_1 + ... + P_N, Dv] tensor for each layer.
        prefix_lengths: one int32 [N] tensor for each layer, as
            :func:`fastprefix.prefix_attention` accepts them. Layers of the same lengths share it.
        longest: the length of the longest prefix, layer by layer.
        position_offset: the largest offset of all prefixes.
        position_offsets: int64 [N + 1], the position of the first token behind each prefix. The
            last entry is 0, for rows without a prefix, whose index is -1.
        offsets: the first N of these offsets, on the host.
        windowed: [N], ``in_window`` of each prefix.
        kinds: [N], the kind of each prefix's :class:`Reweighting`; None for prefixes without one.
        biases: one [Hq, N] tensor for each layer, with 0 for prefixes without biases; [0, N] if no
            prefix has any.
        gates: the same for gates.
        states: [N], the states of each prompt; None for prefixes without states.
    """

    names: tuple[str, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    prefix_lengths: tuple[Tensor, ...]
    longest: tuple[int, ...]
    position_offset: int
    position_offsets: Tensor
    offsets: tuple[int, ...]
    windowed: tuple[bool, ...]
    kinds: tuple[Kind | None, ...]
    biases: tuple[Tensor, ...]
    gates: tuple[Tensor, ...]
    states: tuple[States | None, ...] = ()

    @classmethod
    def pack(cls, prefixes: Mapping[str, PrefixKV]) -> PackedPrefixKV:
        """Puts prefixes end to end. Gradients reach each.

        Args:
            prefixes: at least one prefix, by name. Lengths may differ between prefixes and layers.

        Raises:
            TypeError: a value is not a PrefixKV.
            ValueError: there are none; a name is None; or layer shapes, dtypes or devices differ.
        """
        if not prefixes:
            raise ValueError("kv: got no prefixes, takes at least one by name")
        for name, kv in prefixes.items():
            if name is None:
                raise ValueError("kv: got a prefix named None, which in rows stands for none")
            if not isinstance(kv, PrefixKV):
                raise TypeError(f"kv: got {type(kv).__name__} for {name!r}, takes a PrefixKV")
        (first_name, first), *others = prefixes.items()
        for name, kv in others:
            for what in ("shapes", "dtype", "device"):
                got, want = getattr(kv, what), getattr(first, what)
                if got != want:
                    raise ValueError(
                        f"kv: got {name!r} with {what} {got}, takes {want} as of {first_name!r}"
                    )
        members = list(prefixes.values())
        layers = range(first.num_layers)
        lengths = [tuple(kv.keys[layer].shape[1] for kv in members) for layer in layers]
        tensors = {
            one: torch.tensor(one, dtype=torch.int32, device=first.device) for one in lengths
        }
        offsets = [*(kv.position_offset for kv in members), 0]
        return cls(
            tuple(prefixes),
            tuple(torch.cat([kv.keys[layer] for kv in members], 1) for layer in layers),
            tuple(torch.cat([kv.values[layer] for kv in members], 1) for layer in layers),
            tuple(tensors[one] for one in lengths),
            tuple(max(one) for one in lengths),
            max(offsets),
            torch.tensor(offsets, device=first.device),
            tuple(offsets[:-1]),
            tuple(kv.in_window for kv in members),
            tuple(kind_of(kv.reweighting) for kv in members),
            tuple(_heads(members, layer, "bias") for layer in layers),
            tuple(_heads(members, layer, "gate") for layer in layers),
            tuple(kv.states for kv in members),
        )

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return len(self.keys)

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """The numbers and sizes of heads, layer by layer."""
        return tuple(
            LayerShape(key.shape[0], key.shape[2], value.shape[2])
            for key, value in zip(self.keys, self.values, strict=True)
        )

    @property
    def num_heads(self) -> tuple[int, ...]:
        """The number of query heads of each layer in which any prefix reweights them; else 0."""
        return tuple(
            max(bias.shape[0], gate.shape[0])
            for bias, gate in zip(self.biases, self.gates, strict=True)
        )

    @property
    def in_window(self) -> bool:
        """Whether any prefix slides out of a sliding window."""
        return any(self.windowed)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Key [Hkv, P_1 + ... + P_N, D] and value [Hkv, P_1 + ... + P_N, Dv] of a layer."""
        return self.keys[index], self.values[index]

    def prefix_ids(self, rows: Sequence[str | None]) -> tuple[int, ...]:
        """Returns [R], the index of the prefix that each row attends to; -1 for None.

        Raises:
            ValueError: rows are empty, or there is no prefix of a name.
        """
        if len(rows) == 0:
            raise ValueError("rows: got no names, takes one for each row of the batch")
        ids: dict[str | None, int] = {name: i for i, name in enumerate(self.names)}
        ids[None] = -1
        for name in rows:
            if name not in ids:
                raise ValueError(
                    f"rows: got {name!r}, takes one of {list(self.names)}, or None for no prefix"
                )
        return tuple(ids[name] for name in rows)

    def index(self, rows: Sequence[str | None]) -> Tensor:
        """Returns :meth:`prefix_ids` as an int32 [R] tensor."""
        device = self.position_offsets.device
        return torch.tensor(self.prefix_ids(rows), dtype=torch.int32, device=device)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> PackedPrefixKV:
        """Returns a copy on another device or in another dtype. Tensors that fit are shared."""
        moved = {id(one): one.to(device) for one in self.prefix_lengths}
        return replace(
            self,
            keys=tuple(tensor.to(device=device, dtype=dtype) for tensor in self.keys),
            values=tuple(tensor.to(device=device, dtype=dtype) for tensor in self.values),
            prefix_lengths=tuple(moved[id(one)] for one in self.prefix_lengths),
            position_offsets=self.position_offsets.to(device),
            biases=tuple(tensor.to(device) for tensor in self.biases),
            gates=tuple(tensor.to(device) for tensor in self.gates),
            states=tuple(mapped(one, lambda x: x.to(device)) for one in self.states),
        )


def _heads(members: Sequence[PrefixKV], layer: int, kind: Kind) -> Tensor:
    """The biases or gates [Hq, N] of a layer; 0 for prefixes that have none."""
    found = [
        kv.reweighting.heads[layer] if kv.reweighting and kv.reweighting.kind == kind else None
        for kv in members
    ]
    Hq = max(0 if x is None else x.shape[0] for x in found)
    none = torch.zeros(Hq, device=members[0].device)
    columns = [none if x is None or x.shape[0] == 0 else x for x in found]
    for column in columns:
        if column.shape[0] != Hq:
            raise ValueError(
                f"kv: got {column.shape[0]} query heads in layer {layer} of a prefix and {Hq} of "
                "another, takes the same"
            )
    return torch.stack(columns, 1)
