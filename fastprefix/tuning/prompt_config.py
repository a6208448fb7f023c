"""How an input-level prompt is made and trained; names as in PEFT where PEFT has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fastprefix.hf.peft_prompts import INFIX_KIND
from fastprefix.tuning.config import TASK_TYPES

Init = Literal["random", "text", "vocab"]
Reparameterization = Literal["MLP", "LSTM"]
Placement = Literal["prefix", "infix"]


@dataclass
class PromptConfig:
    """Configuration of prompts that enter a model as embeddings.

    As it is: prompt tuning (Lester et al. 2021), which is also the embedding-only ablation of
    prefix tuning (Li and Liang 2021, section 7.2). With a reparameterisation: P-tuning (Liu et
    al. 2021). With placement="infix": infix-tuning (Li and Liang 2021, section 7.3), on
    embeddings.

    Attributes:
        num_virtual_tokens: prompt length P.
        task_type: PEFT's name of the task; None leaves it open.
        placement: "prefix", in front of the text; "infix", within it, where each call says.
        encoder_reparameterization_type: "MLP" or "LSTM", a network that computes the prompt, as in
            PEFT's PromptEncoder; None for the prompt itself.
        encoder_hidden_size: the network's hidden size; the embeddings' width if None.
        encoder_num_layers: layers of the LSTM.
        encoder_dropout: between the LSTM's layers.
        modules_to_save: modules of the base that are trained and saved too, by the last part of
            their names; those that PEFT takes for the task if None.
        init: "random", "text" (the embeddings of init_text, repeated or cut to P tokens) or
            "vocab" (those of tokens drawn at random from the vocabulary).
        init_text: the text for init="text".
        init_std: standard deviation of the random start; if None, 0.02 for a prompt itself and 1
            for what a network reads.

    Raises:
        ValueError: a field has a value it does not take; the message names it.
    """

    num_virtual_tokens: int = 20
    task_type: str | None = "CAUSAL_LM"
    placement: Placement = "prefix"
    encoder_reparameterization_type: Reparameterization | None = None
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    modules_to_save: list[str] | None = None
    init: Init = "random"
    init_text: str | None = None
    init_std: float | None = None

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method, or ours for an infix, which PEFT does not have."""
        if self.placement == "infix":
            return INFIX_KIND
        return "P_TUNING" if self.encoder_reparameterization_type else "PROMPT_TUNING"

    @property
    def is_prompt_learning(self) -> bool:
        """True, as of PEFT's configurations of such prompts."""
        return True

    def __post_init__(self) -> None:
        network = (*get_args(Reparameterization), None)
        for name, choices in (
            ("task_type", TASK_TYPES),
            ("placement", get_args(Placement)),
            ("encoder_reparameterization_type", network),
            ("init", get_args(Init)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, takes one of {choices}")
        for name in ("num_virtual_tokens", "encoder_hidden_size", "encoder_num_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, takes 1 or more")
        if self.encoder_reparameterization_type != "LSTM" and (
            self.encoder_num_layers != 2 or self.encoder_dropout != 0.0
        ):
            raise ValueError(
                f"encoder_num_layers, encoder_dropout: got {self.encoder_num_layers} and "
                f"{self.encoder_dropout}, which are the LSTM's; takes them with "
                "encoder_reparameterization_type='LSTM'"
            )
        if not 0.0 <= self.encoder_dropout < 1.0:
            raise ValueError(f"encoder_dropout: got {self.encoder_dropout}, takes 0 to under 1")
        if (self.init == "text") != bool(self.init_text):
            raise ValueError(
                f"init_text: got {self.init_text!r} with init={self.init!r}; a text goes with "
                "init='text' and only with it"
            )
        if self.init_std is not None and not self.init_std >= 0.0:
            raise ValueError(f"init_std: got {self.init_std}, takes 0 or more")
