"""Classifiers with adapters that have heads of their own."""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from fastprefix import PrefixConfig, PrefixTuningModel, PromptConfig, PromptTuningModel

P = 3
CLOSE = {"rtol": 0, "atol": 2e-5}
_SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2}
_NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
# how the class is called, its configuration, the task, and what is trained of the base
CASES: dict[str, tuple[str, dict[str, Any], str, set[str]]] = {
    "bert": ("Bert", {**_SIZES, **_STILL}, "SEQ_CLS", {"classifier"}),
    "roberta": ("Roberta", {**_SIZES, **_STILL}, "SEQ_CLS", {"classifier"}),
    "distilbert": (
        "DistilBert",
        {"vocab_size": 101, "pad_token_id": 0, **_DISTIL, **_NO_DROPOUT},
        "SEQ_CLS",
        {"classifier", "pre_classifier"},
    ),
    "llama": ("Llama", {**_SIZES, "num_key_value_heads": 2}, "SEQ_CLS", {"score"}),
    "bert tokens": ("Bert", {**_SIZES, **_STILL}, "TOKEN_CLS", {"classifier"}),
    "bert answers": ("Bert", {**_SIZES, **_STILL}, "QUESTION_ANS", {"qa_outputs"}),
}
_ENDS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "CAUSAL_LM": "ForCausalLM",
}
WRAPS: dict[str, tuple[Any, Any, Any]] = {
    "prefix": (PrefixTuningModel, PrefixConfig, peft.PrefixTuningConfig),
    "prompt": (PromptTuningModel, PromptConfig, peft.PromptTuningConfig),
}
FILE = "adapter_model.safetensors"


def build(case: str, task_type: str | None = None, **changes: Any) -> Any:
    """The same weights every time."""
    name, sizes, task, _ = CASES[case]
    of = getattr(transformers, name + _ENDS[task_type or task])
    torch.manual_seed(0)
    labels = {} if (task_type or task) in ("QUESTION_ANS", "CAUSAL_LM") else {"num_labels": 3}
    return of(getattr(transformers, f"{name}Config")(**{**sizes, **labels, **changes})).eval()


def loud(tuned: Any) -> Any:
    """Adapters and heads with numbers that differ from each other's, in eval mode."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if not name.startswith("base_model."):
                parameter.normal_(0, 0.5)
    return tuned.eval()


def two(case: str, wrap: str = "prefix", **changes: Any) -> Any:
    """A model with two adapters, each with a head of its own."""
    of, config, _ = WRAPS[wrap]
    task = CASES[case][2]
    tuned = of(build(case, **changes), config(P, task_type=task))
    tuned.add_adapter("second", config(P + 1, task_type=task))
    return loud(tuned)


def answers(model: Any, ids: Tensor, mask: Tensor, **names: Any) -> Tensor:
    """Logits of the text, or both of a model that answers questions."""
    out = model(input_ids=ids, attention_mask=mask, **names)
    logits: Tensor | None = out.get("logits")
    if logits is None:
        logits = torch.stack([out.start_logits, out.end_logits], -1)
    return logits[:, -ids.shape[1] :] if logits.dim() == 3 else logits  # PEFT's has the prompt, too
