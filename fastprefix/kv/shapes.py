"""What a model's attention layers look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastprefix.arguments import methods_refuse_unknown_arguments

# The part of a model that a layer's attention belongs to: an encoder's self-attention, a decoder's
# self-attention (all there is in a decoder-only model), or a decoder's attention to the encoder.
Group = Literal["encoder", "decoder", "cross"]


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class LayerShape:
    """The sizes of one attention layer's keys and values.

    Attributes:
        num_heads: the number of key/value heads, Hkv.
        key_size: D.
        value_size: Dv.
    """

    num_heads: int
    key_size: int
    value_size: int

    @property
    def width(self) -> int:
        """How many numbers one virtual token has in this layer, key and value together."""
        return self.num_heads * (self.key_size + self.value_size)
