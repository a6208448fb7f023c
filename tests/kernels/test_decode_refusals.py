"""What decode refuses, and what the one-pass kernel does in its place."""

from __future__ import annotations

import pytest
import torch

from fastprefix.kernels import launch_forward
from fastprefix.kernels.decode import decode_forward
from fastprefix.options import Options
from fastprefix_testing.launchers import interpreted

pytestmark = interpreted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 4, 65, 8)}, "query: got Lq = 65, decode takes at most 64"),
        ({"attn_mask": torch.zeros(2, 1, 1, 7)}, "attn_mask: decode takes none"),
        ({"dropout_p": 0.1, "dropout_seed": torch.zeros(1, dtype=torch.int64)}, "dropout_p: got 0"),
        ({"sliding_window": 3, "prefix_in_window": True}, "prefix_in_window: got True"),
        ({"prefix_bias": torch.zeros(4, 1, 3)}, r"prefix_bias: got shape \[4, 1, 3\]"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_left_to_the_one_pass_kernel(changes, message):
    operands = operands_that_fit(**changes)
    invariant = operands | {"options": operands["options"]._replace(batch_invariant=True)}
    with pytest.raises(ValueError, match=message):
        decode_forward(**operands)
    launch_forward(**operands)
    if "dropout_p" in changes:
        with pytest.raises(ValueError, match="batch_invariant does not go with dropout_p"):
            launch_forward(**invariant)
        return
    launch_forward(**invariant)
    real = torch.ones(2, 7, dtype=torch.bool)
    invariant["options"] = invariant["options"]._replace(key_padding_mask=real)
    message = "batch_invariant: key_padding_mask for decode alone; " + message
    with pytest.raises(ValueError, match=message):
        launch_forward(**invariant)


def operands_that_fit(**changes) -> dict:
    """The arguments of a call, by name: options, too."""
    operands = {
        "query": torch.zeros(2, 4, 1, 8),
        "key": torch.zeros(2, 2, 7, 8),
        "value": torch.zeros(2, 2, 7, 8),
        "prefix_key": torch.zeros(2, 3, 8),
        "prefix_value": torch.zeros(2, 3, 8),
    }
    options = {name: value for name, value in changes.items() if name not in operands}
    operands |= {name: value for name, value in changes.items() if name in operands}
    return {**operands, "options": Options(is_causal=False, scale=1.0, **options)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 3, 1, 8)}, "not a multiple of 2 key heads"),
        ({"key": torch.zeros(2, 2, 9, 8)}, "value has shape"),
        ({"sinks": torch.zeros(3)}, "sinks must be float32"),
        ({"sliding_window": 0}, "sliding_window: got 0"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_operands_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        decode_forward(**operands_that_fit(**changes))
