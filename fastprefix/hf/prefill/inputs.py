"""Checks the arguments that make up a prompt: those of the model's forward, images included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastprefix.arguments import shown, unknown_argument
from fastprefix.hf.devices import device_of
from fastprefix.hf.versions import CACHE_NAMES, parameters

# Arguments of a forward that are not part of a prompt, or are set by its run.
_NO_INPUTS = {
    *CACHE_NAMES, "position_ids", "labels", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "logits_to_keep", "self", "kwargs", "args",
}  # fmt: skip
# Kinds of input that replace tokens of the text, and the arguments that carry them.
_KINDS = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}


def prompt_inputs(
    model: PreTrainedModel, input_ids: Tensor | Sequence[int] | None, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Keyword arguments of one forward over a prompt.

    Raises:
        TypeError: input_ids are no ids; both input_ids and inputs_embeds are given, or neither; or
            the forward does not have an argument.
        ValueError: not one prompt without padding; or the text has places for images, but no images
            are given.
    """
    found = {name: x for name, x in inputs.items() if x is not None}
    known = [name for name in _known(model) if name not in _NO_INPUTS]
    for name in found:
        if name in _NO_INPUTS:
            raise TypeError(f"{name}: got {shown(found[name])}, takes None: it is no prompt's")
        if name not in known:
            raise unknown_argument(f"prefill of a {type(model).__name__}", name, known)
    given = [input_ids, found.get("inputs_embeds")]
    if (given[0] is None) == (given[1] is None):
        got = "neither" if given[0] is None else "both"
        raise TypeError(f"input_ids, inputs_embeds: got {got}, takes one of them")
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
            f"attention_mask: got {list(torch.as_tensor(mask).shape)}, takes ones alone, "
            f"{list(length)}: a prompt without padding"
        )
    return {
        name: x.to(device_of(model)) if isinstance(x, Tensor) else x for name, x in found.items()
    }


def _known(model: PreTrainedModel) -> list[str]:
    """Parameters of the forwards of a model and of its base model."""
    return list(dict.fromkeys([*parameters(model), *parameters(model.base_model)]))


def one_prompt(model: PreTrainedModel, input_ids: Tensor | Sequence[int]) -> Tensor:
    """Token ids [1, P] of one text.

    Raises:
        TypeError: input_ids are no numbers.
        ValueError: the model reads no text; or input_ids is empty, has several rows, or contains an
            id that is not in the model's vocabulary.
    """
    if "input_ids" not in parameters(model):
        raise ValueError(
            f"model: got {type(model).__name__}, which reads {model.main_input_name}, takes one "
            "that reads text"
        )
    takes = "takes the token ids of one prompt, [P] or [1, P], P at least 1"
    try:
        ids = torch.as_tensor(input_ids, device=device_of(model))
    except (RuntimeError, TypeError, ValueError):
        hint = "; PrefixKV.from_text takes a text" if isinstance(input_ids, str) else ""
        raise TypeError(f"input_ids: got {shown(input_ids)}, {takes}{hint}") from None
    if ids.dim() == 1:
        ids = ids[None]
    whole = not ids.is_floating_point() and ids.dtype is not torch.bool
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or not whole:
        raise ValueError(f"input_ids: got {ids.dtype} of shape {list(ids.shape)}, {takes}")
    _check_vocabulary(model, ids)
    return ids


def _check_vocabulary(model: PreTrainedModel, ids: Tensor) -> None:
    """Refuses ids without an embedding; on a GPU they would end the process."""
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if rows is None or ids.device.type == "meta":
        return
    # tokens of images and sound may be outside: they are replaced before the embedding
    special = [token for _, _, token in _places(model)]
    text = ids[~torch.isin(ids, ids.new_tensor(special))]
    if text.numel() == 0:
        return
    least, most = (int(x) for x in text.aminmax())
    if least < 0 or most >= rows:
        raise ValueError(
            f"input_ids: got ids from {least} to {most}, takes 0 to {rows - 1}: the model's "
            "vocabulary"
        )


def _check_pictures(model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Refuses tokens for images, videos or sound if no input replaces them."""
    if any(
        (isinstance(x, Tensor) and x.is_floating_point()) or "encoder_outputs" in name
        for name, x in found.items()
    ):
        return
    for kind, field, token in _places(model):
        if bool((found["input_ids"] == token).any()):
            default = _KINDS[kind]
            names = [name for name in _known(model) if name.startswith(default)]
            raise ValueError(
                f"input_ids: got the token {token} of the config's {field}, takes "
                f"{names[0] if names else default} beside it: as "
                "PrefixKV.prefill(model, **processor(text=..., images=...))"
            )


def _places(model: PreTrainedModel) -> Iterator[tuple[str, str, int]]:
    """Tokens that images, videos and sound replace: the kind, the config's field, the token."""
    for kind in _KINDS:
        for field in (f"{kind}_token_id", f"{kind}_token_index"):
            token = getattr(model.config, field, None)
            if isinstance(token, int):
                yield kind, field, token
