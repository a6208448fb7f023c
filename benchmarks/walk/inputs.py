"""What each kind of class is given: texts, and what it insists on besides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from walk.build import takes, text

END = 1  # id of the end of a text in every small configuration


def is_encoder_decoder(model: Any) -> bool:
    """Whether it is fed two texts."""
    return takes(model, "decoder_input_ids")


def ids_for(model: Any, task: str, rows: int, length: int, seed: int) -> Tensor:
    """Random tokens [rows, length]; classifiers get the ends that some look for."""
    ids = text(rows, length, seed)
    if task in ("classification", "answering"):
        # Longformer wants three separators in a question and its context
        last = 3 if task == "answering" and "Longformer" in type(model).__name__ else 1
        ids[:, max(length - last, 0) :] = END
    return ids


def arguments(model: Any, task: str, ids: Tensor) -> dict[str, Any]:
    """Keyword arguments of a forward on these tokens."""
    given: dict[str, Any] = {"input_ids": ids}
    if is_encoder_decoder(model) and task == "seq2seq":
        given["decoder_input_ids"] = text(1, 4, 55).expand(len(ids), -1)
    if takes(model, "visual_feats"):  # LXMERT
        size = model.config.visual_feat_dim
        generator = torch.Generator().manual_seed(8)
        given["visual_feats"] = torch.randn(1, 3, size, generator=generator).expand(
            len(ids), -1, -1
        )
        given["visual_pos"] = torch.rand(1, 3, 4, generator=generator).expand(len(ids), -1, -1)
    return given
