"""How long the prefix of each layer is."""

from __future__ import annotations

from collections.abc import Sequence

from fastprefix.arguments import refuses_unknown_arguments


@refuses_unknown_arguments
def slot_lengths(
    num_slots: int,
    num_virtual_tokens: int,
    layers: Sequence[int] | None = None,
    layer_lengths: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """The number of virtual tokens of each attention layer.

    Args:
        num_slots: the number of the model's attention layers.
        num_virtual_tokens: the number of tokens in each layer that gets a prefix.
        layers: the layers that get a prefix; all if None.
        layer_lengths: the number of tokens of each layer, in place of the two arguments before.

    Raises:
        ValueError: layers or layer_lengths do not fit the model.
    """
    if layer_lengths is not None:
        if len(layer_lengths) != num_slots:
            raise ValueError(
                f"layer_lengths: got {len(layer_lengths)} of them, takes one for each of the "
                f"model's {num_slots} attention layers"
            )
        return tuple(layer_lengths)
    if layers is None:
        return (num_virtual_tokens,) * num_slots
    if max(layers) >= num_slots:
        raise ValueError(
            f"layers: got {max(layers)}, takes 0 to {num_slots - 1} for this model's "
            f"{num_slots} attention layers"
        )
    return tuple(num_virtual_tokens if slot in layers else 0 for slot in range(num_slots))
