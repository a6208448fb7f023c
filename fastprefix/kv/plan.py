"""How much memory prefixes will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fastprefix.arguments import methods_refuse_unknown_arguments, refuses_unknown_arguments
from fastprefix.kv.shapes import LayerShape


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class KVPlan:
    """The bytes that prefixes will take.

    Attributes:
        nbytes: the bytes of each prefix, by name.
        expanded: the bytes of each prefix if it were copied for every row of a batch, by name.
    """

    nbytes: dict[str, int]
    expanded: dict[str, int]

    @property
    def total(self) -> int:
        """The bytes of all prefixes."""
        return sum(self.nbytes.values())


@refuses_unknown_arguments
def plan_kv_bytes(
    shapes: Sequence[LayerShape],
    num_virtual_tokens: Mapping[str, int],
    dtype: torch.dtype,
    batch_size: int = 1,
) -> KVPlan:
    """Computes what prefixes of given lengths will take, before anything is allocated.

    Args:
        shapes: the shapes of the model's layers, e.g. ``fastprefix.hf.patch_of(model).shapes``. The
            model may be on the meta device.
        num_virtual_tokens: the length of each prefix, by name.
        dtype: the dtype of keys and values.
        batch_size: the number of rows, for the comparison with copies.

    Raises:
        ValueError: a length or the batch size is below 0.
    """
    if batch_size < 0 or any(length < 0 for length in num_virtual_tokens.values()):
        raise ValueError(
            f"num_virtual_tokens, batch_size: got {dict(num_virtual_tokens)} and {batch_size}, "
            "takes 0 or more"
        )
    token = sum(shape.width for shape in shapes) * dtype.itemsize
    nbytes = {name: length * token for name, length in num_virtual_tokens.items()}
    return KVPlan(nbytes, {name: n * batch_size for name, n in nbytes.items()})
