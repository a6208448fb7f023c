"""Inputs that join a prompt and a text, and the text's part of the outputs.

The caller's inputs and outputs are those of the text. This module checks the inputs, joins them
with the prompt's, and separates the outputs again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastprefix.arguments import shown
from fastprefix.hf.versions import cache_of, length_of
from fastprefix.tuning.configs.prompt_config import PromptConfig
from fastprefix.tuning.misspelt import check_tensors
from fastprefix.tuning.prompt_layout import PromptLayout, joined_positions

# Outputs that may have one entry for each token, and the dimensions that they have in that case.
_PER_TOKEN = {"logits": 3, "last_hidden_state": 3, "start_logits": 2, "end_logits": 2}


def check_text(
    mask: Tensor | None,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
    is_encoder_decoder: bool,
) -> None:
    """Refuses inputs with which the result would silently be wrong.

    Args:
        mask: the call's attention_mask.
        position_ids: the call's position_ids.
        kwargs: the call's other arguments.
        is_encoder_decoder: whether the base is an encoder-decoder, whose cache is the decoder's.

    Raises:
        ValueError: the mask is not one of padding, a cache holds tokens, or sequences are packed.
    """
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"attention_mask: got {mask.dim()} dimensions, takes [B, L] with a prompt")
    if length_of(cache_of(kwargs)) and not is_encoder_decoder:
        raise ValueError(
            "past_key_values: got a cache that holds tokens, takes an empty one: the prompt "
            "would come again behind them; use generate(), or export() and use_prefix"
        )
    packed = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx"))
    if position_ids is not None and mask is None and not torch.compiler.is_compiling():
        packed = packed or bool((position_ids.diff(dim=-1) < 0).any())
    if packed:
        raise ValueError(
            "cu_seq_lens_q, position_ids: got packed sequences, each of which would need the "
            "prompt; takes a padded batch"
        )


def text_embeddings(
    model: PreTrainedModel, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor:
    """Returns the text's embeddings [B, L, hidden]: the given ones, or those of ids [B, L].

    Raises:
        ValueError: both are given, or neither.
    """
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ValueError(f"input_ids, inputs_embeds: got {got}, takes one of them")
    if inputs_embeds is not None:
        return inputs_embeds
    embeddings: Tensor = model.get_input_embeddings()(input_ids)
    return embeddings


def tokens_before_prompt(
    config: PromptConfig, infix_positions: Tensor | None, mask: Tensor | None, B: int, L: int
) -> Tensor | None:
    """Returns [B], how many real tokens of each row come before an infix.

    Args:
        config: the prompt's configuration.
        infix_positions: the caller's argument.
        mask: [B, L], 0 for padding; None if there is no padding.
        B: the number of rows.
        L: the number of the text's tokens, including padding.

    Returns:
        None for a prompt in front of the text.

    Raises:
        TypeError: infix_positions are no tensor.
        ValueError: they are missing or out of range, or given for a prompt in front of the text.
    """
    if config.placement == "prefix":
        if infix_positions is not None:
            raise ValueError(
                f"infix_positions: got {shown(infix_positions)}, takes None with placement='prefix'"
            )
        return None
    check_tensors(infix_positions=infix_positions)
    if infix_positions is None or infix_positions.shape != (B,):
        got = None if infix_positions is None else list(infix_positions.shape)
        raise ValueError(f"infix_positions: got {got}, takes [B] = [{B}] for an infix")
    if not torch.compiler.is_compiling():
        real = L if mask is None else mask.bool().sum(1).to(infix_positions.device)
        if bool(((infix_positions < 0) | (infix_positions > real)).any()):
            raise ValueError(
                f"infix_positions: got {infix_positions.tolist()}, takes 0 to a row's number "
                "of real tokens"
            )
    return infix_positions


def join_inputs(
    layout: PromptLayout,
    prompt: Tensor,
    embeds: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    tokens_before: Tensor | None,
) -> dict[str, Tensor]:
    """Returns inputs_embeds for the base, and attention_mask and position_ids if the text has them.

    Args:
        layout: the layout of the rows.
        prompt: [P, hidden].
        embeds: the text's embeddings, [B, L, hidden].
        mask: the text's mask, [B, L].
        position_ids: the text's positions, [B or 1, L].
        tokens_before: see :func:`tokens_before_prompt`.
    """
    prompt = prompt.to(embeds.device, embeds.dtype)
    joined = {"inputs_embeds": layout.join(prompt[None].expand(len(embeds), -1, -1), embeds)}
    if mask is not None:
        joined["attention_mask"] = layout.join(1, mask)
    if position_ids is not None:
        rows = position_ids.expand(len(embeds), -1)
        joined["position_ids"] = joined_positions(layout, rows, mask, tokens_before)
    return joined


def join_targets(
    layout: PromptLayout, kwargs: dict[str, Any], labels: Tensor | None, labels_per_token: bool
) -> dict[str, Tensor]:
    """Returns token types, labels, and start and end positions for prompt and text.

    Args:
        layout: the layout of the rows.
        kwargs: the call's other arguments. Those that are joined are removed from it.
        labels: the text's labels, [B, L]; or labels of another shape, which the base's task needs.
        labels_per_token: whether the base compares the labels with the logits of its input tokens.
    """
    joined: dict[str, Tensor] = {}
    if kwargs.get("token_type_ids") is not None:
        joined["token_type_ids"] = layout.join(0, kwargs.pop("token_type_ids"))
    if labels is not None:
        joined["labels"] = layout.join(-100, labels) if labels_per_token else labels
    for name in ("start_positions", "end_positions"):
        if kwargs.get(name) is not None:
            joined[name] = _joined_columns(layout, kwargs.pop(name))
    return joined


def keep_text_outputs(layout: PromptLayout, output: Any) -> None:
    """Removes the prompt's part of a base's outputs for each token, in place.

    Args:
        layout: the layout of the rows.
        output: what the base's forward returned, not as a tuple.
    """
    joined_length = layout.length + layout.prompt_length
    for name, dims in _PER_TOKEN.items():
        value = output.get(name)
        if value is not None and value.dim() == dims and value.shape[1] == joined_length:
            output[name] = layout.text(value)


def _joined_columns(layout: PromptLayout, places: Tensor) -> Tensor:
    """Converts indices [B] of text tokens to columns of prompt and text together.

    A loss ignores an index beyond the text. It becomes a column beyond prompt and text.
    """
    places = places.reshape(len(places))
    columns = layout.places().to(places.device).expand(len(places), -1)
    inside = columns.gather(1, places.clamp(0, layout.length - 1)[:, None])[:, 0]
    beyond = torch.full_like(inside, layout.length + layout.prompt_length)
    return torch.where(places < layout.length, inside, beyond)
