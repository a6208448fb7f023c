"""How a prefix is made and trained; names as in PEFT where PEFT has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fastprefix.kv import Group

Init = Literal["random", "text", "vocab"]
TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")


@dataclass
class PrefixConfig:
    """Configuration of prefix tuning (Li and Liang 2021).

    Attributes:
        num_virtual_tokens: prefix length P.
        task_type: "CAUSAL_LM", "SEQ_2_SEQ_LM" (encoder-decoders) or "FEATURE_EXTRACTION"
            (encoders); others are not supported yet.
        prefix_projection: train an MLP that produces the prefix, not the prefix itself.
        encoder_hidden_size: the MLP's hidden size; the model's hidden size if None.
        position_offset: by how much the prefix moves the positions of the text; of the decoder's
            text in encoder-decoders. If None, num_virtual_tokens in decoder-only models, BERT,
            RoBERTa and ELECTRA, as in PEFT, and 0 in other models: the text keeps the positions
            that it has without a prefix.
        groups: which layers get a prefix, "encoder" (an encoder's own attention), "decoder" (a
            decoder's own) or "cross" (its attention to the encoder); all that the model has if
            None, as Li and Liang do.
        dropout: probability of zeroing a number of the prefix in training.
        init: "random", "text" (the model's own keys and values for init_text, repeated or cut to
            P tokens) or "vocab" (those for tokens drawn at random from the vocabulary).
        init_text: the text for init="text".
        init_std: standard deviation of the random start.

    Raises:
        ValueError: a field has a value it does not take; the message names it.
    """

    num_virtual_tokens: int = 20
    task_type: str = "CAUSAL_LM"
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    position_offset: int | None = None
    groups: Sequence[Group] | None = None
    dropout: float = 0.0
    init: Init = "random"
    init_text: str | None = None
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens: got {self.num_virtual_tokens}, takes 1 or more")
        if self.task_type not in TASK_TYPES:
            raise ValueError(
                f"task_type: got {self.task_type!r}, takes one of {TASK_TYPES}; others come later"
            )
        if self.groups is not None:
            if not self.groups or not set(self.groups) <= set(get_args(Group)):
                raise ValueError(
                    f"groups: got {self.groups!r}, takes some of {get_args(Group)}, or None for all"
                )
            self.groups = tuple(self.groups)
        if self.encoder_hidden_size is not None and self.encoder_hidden_size < 1:
            raise ValueError(
                f"encoder_hidden_size: got {self.encoder_hidden_size}, takes 1 or more"
            )
        if self.position_offset is not None and self.position_offset < 0:
            raise ValueError(f"position_offset: got {self.position_offset}, takes 0 or more")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: got {self.dropout}, takes 0 <= dropout < 1")
        if self.init not in get_args(Init):
            raise ValueError(f"init: got {self.init!r}, takes one of {get_args(Init)}")
        if (self.init == "text") != bool(self.init_text):
            raise ValueError(
                f"init_text: got {self.init_text!r} with init={self.init!r}; a text goes with "
                "init='text' and only with it"
            )
        if not self.init_std >= 0.0:
            raise ValueError(f"init_std: got {self.init_std}, takes 0 or more")
