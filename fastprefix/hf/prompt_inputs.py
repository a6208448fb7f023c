"""What a prompt is made of: what the model's forward takes, images among it, checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastprefix.hf.devices import device_of
from fastprefix.hf.versions import CACHE_NAMES, parameters

# What a forward takes besides, and a prompt's run says itself.
_NO_INPUTS = {
    *CACHE_NAMES, "position_ids", "labels", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "logits_to_keep", "self", "kwargs", "args",
}  # fmt: skip
# Where images, videos and sound stand in the text, and by which inputs they come.
_KINDS = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}


def prompt_inputs(
    model: PreTrainedModel, input_ids: Tensor | Sequence[int] | None, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Keyword arguments of one forward over a prompt.

    Raises:
        TypeError: input_ids and inputs_embeds, neither or both, or what the forward does not take.
        ValueError: not one prompt without padding, or images in the text alone.
    """
    found = {name: x for name, x in inputs.items() if x is not None}
    known = [name for name in _known(model) if name not in _NO_INPUTS]
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(
                f"{name}: not among the inputs of which {type(model).__name__} can make a "
                f"prompt{hint}"
            )
    given = [input_ids, found.get("inputs_embeds")]
    if (given[0] is None) == (given[1] is None):
        raise TypeError("input_ids, inputs_embeds: takes one of them")
    if input_ids is not None:
        found = {"input_ids": one_prompt(model, input_ids), **found}
        _check_pictures(model, found)
    length = found["input_ids" if input_ids is not None else "inputs_embeds"].shape[:2]
    if length[0] != 1 or length[1] == 0:
        raise ValueError(f"inputs_embeds: got {list(length)}, takes one prompt, [1, P, width]")
    mask = found.pop("attention_mask", None)
    if mask is not None and (
        tuple(torch.as_tensor(mask).shape) not in (tuple(length), tuple(length[1:]))
        or not bool(torch.as_tensor(mask).bool().all())
    ):
        raise ValueError(
            f"attention_mask: takes ones alone, {list(length)}: a prompt without padding"
        )
    return {
        name: x.to(device_of(model)) if isinstance(x, Tensor) else x for name, x in found.items()
    }


def _known(model: PreTrainedModel) -> list[str]:
    """Parameters of the forward of a model and of the one under its head."""
    return list(dict.fromkeys([*parameters(model), *parameters(model.base_model)]))


def one_prompt(model: PreTrainedModel, input_ids: Tensor | Sequence[int]) -> Tensor:
    """Token ids [1, P] of one text.

    Raises:
        ValueError: the model reads no text, or input_ids is empty or holds several.
    """
    if "input_ids" not in parameters(model):
        raise ValueError(
            f"model: got {type(model).__name__}, which reads {model.main_input_name}, takes one "
            "that reads text"
        )
    ids = torch.as_tensor(input_ids, device=device_of(model))
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or ids.is_floating_point():
        raise ValueError(
            f"input_ids: got {ids.dtype} of shape {list(ids.shape)}, takes the token ids of one "
            "prompt, [P] or [1, P], P at least 1"
        )
    return ids


def _check_pictures(model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Refuses places for images, videos or sound that nothing is put into."""
    if any(
        (isinstance(x, Tensor) and x.is_floating_point()) or "encoder_outputs" in name
        for name, x in found.items()
    ):
        return
    for kind, default in _KINDS.items():
        for field in (f"{kind}_token_id", f"{kind}_token_index"):
            token = getattr(model.config, field, None)
            if isinstance(token, int) and bool((found["input_ids"] == token).any()):
                names = [name for name in _known(model) if name.startswith(default)]
                raise ValueError(
                    f"input_ids: got the token {token} of the config's {field}, takes "
                    f"{names[0] if names else default} beside it: as "
                    "PrefixKV.prefill(model, **processor(text=..., images=...))"
                )
