"""What training starts from: token ids for a prefix or a prompt, numbers for a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.arguments import shown
from fastprefix.encoders import orthogonal, resize
from fastprefix.formats.peft_prefixes import load_adapter
from fastprefix.hf.patch.patch import patch_of
from fastprefix.hf.prefill.recorded import embedding_keys_values, text_keys_values
from fastprefix.kv import FlatLayout, Group, PrefixKV
from fastprefix.tuning.configs.prefix_config import PrefixConfig
from fastprefix.tuning.configs.prompt_config import PromptConfig


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The weight of the token embedding, [vocabulary, hidden]."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def initial_ids(
    config: PrefixConfig | PromptConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Tensor | None:
    """The token ids [P] that training starts from; None for a random start.

    Raises:
        TypeError: tokenizer is none.
        ValueError: the text needs a tokenizer, or has no tokens, or the model reads no tokens.
    """
    P = config.num_virtual_tokens
    if config.init == "random":
        return None
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"init: got {config.init!r}, takes 'random' for this {type(model).__name__}, which "
            f"reads {model.main_input_name} and no text"
        )
    if config.init == "vocab":
        return torch.randint(embedding_weight(model).shape[0], (P,))
    if tokenizer is None:
        raise ValueError(f"tokenizer: got None, takes the model's with init={config.init!r}")
    if not callable(tokenizer):
        raise TypeError(f"tokenizer: got {shown(tokenizer)}, takes the model's tokenizer")
    ids = torch.tensor(tokenizer(config.init_text)["input_ids"])
    if len(ids) == 0:
        raise ValueError(f"init_text: got {config.init_text!r}, takes a text with tokens")
    return ids.repeat(-(-P // len(ids)))[:P]


def initial_prefix(
    config: PrefixConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    layout: FlatLayout,
) -> Tensor | None:
    """The prefix [P, width] that training starts from; None for the encoder's own random start.

    Raises:
        TypeError: tokenizer is none.
        ValueError: init="text" needs a tokenizer and a text with tokens, or init_prefix does not
            fit the model.
        FileNotFoundError: init_prefix does not exist.
    """
    if config.init == "random":
        return None
    if config.init == "zero":
        return torch.zeros(layout.num_virtual_tokens, layout.width)
    if config.init == "orthogonal":
        return orthogonal(layout, config.init_std)
    if config.init == "prefix":
        kv = _load(config, layout, patch_of(model).groups, patch_of(model).sources)
        method = config.init_resize
    else:
        if model.main_input_name != "input_ids":
            raise ValueError(
                f"init: got {config.init!r}, takes another for this {type(model).__name__}, which "
                f"reads {model.main_input_name} and no text"
            )
        ids = initial_ids(config, model, tokenizer)
        assert ids is not None
        make = embedding_keys_values if config.init == "embeddings" else text_keys_values
        kv = make(model, ids)
        method = "pad"  # there are P tokens; a layer with a shorter prefix gets the first ones
    return layout.to_flat(resize(kv, layout.lengths, method, pad_std=config.init_std))


def _load(
    config: PrefixConfig, layout: FlatLayout, groups: Sequence[Group], sources: Sequence[int]
) -> PrefixKV:
    """Reads the prefix that init_prefix names."""
    assert config.init_prefix is not None
    if Path(config.init_prefix).suffix == ".safetensors":
        kv = PrefixKV.load(config.init_prefix)
    else:
        kv = load_adapter(config.init_prefix, layout.shapes, groups, sources).kv
    if kv.reweighting is not None:
        raise ValueError(
            f"init_prefix: {config.init_prefix} has a {kv.reweighting.kind} for each query head, "
            "takes a prefix without; from_pretrained(..., is_trainable=True) trains it further"
        )
    if kv.shapes != layout.shapes:
        raise ValueError(
            f"init_prefix: {config.init_prefix} is a prefix of {kv.num_layers} layers "
            f"{sorted(set(kv.shapes), key=str)}, takes one of {len(layout.shapes)} layers "
            f"{sorted(set(layout.shapes), key=str)} for this model"
        )
    return kv
