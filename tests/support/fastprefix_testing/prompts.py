"""The bare model fed a prompt's embeddings, row by row: the oracle for PromptTuningModel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
)

P = 5
CLOSE = {"rtol": 0, "atol": 2e-5}
KINDS: dict[str, dict[str, Any]] = {
    "prompt": {},
    "mlp": {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 24},
    "lstm": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12},
}


def rows(ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Each row's real tokens, [1, length]."""
    return [ids[row][mask[row].bool()][None] for row in range(len(ids))]


def alone(bare: Any, prompt: Tensor, ids: Tensor, after: int = 0, **kwargs: Any) -> Any:
    """The bare model fed one row without padding: [x ; PROMPT ; y]."""
    embeds = bare.get_input_embeddings()(ids)
    prompt = prompt[None].to(embeds.dtype)
    fed = torch.cat([embeds[:, :after], prompt, embeds[:, after:]], dim=1)
    return bare(inputs_embeds=fed, **kwargs)


def without(whole: Tensor, after: int = 0) -> Tensor:
    """What an output [1, P + L, ...] has for the text."""
    return torch.cat([whole[:, :after], whole[:, after + P :]], dim=1)[0]


def bert(make: Any = BertForSequenceClassification, **changes: Any) -> Any:
    """A BERT with a head, and the same weights each time."""
    config = BertConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        **{"num_labels": 3, **changes},
    )
    torch.manual_seed(0)
    return make(config).eval()
