"""How an input-level prompt is made and trained; names are PEFT's where it has any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from fastprefix.arguments import check_number, methods_refuse_unknown_arguments
from fastprefix.encoders.networks import Reparameterization
from fastprefix.formats.peft_prompts import INFIX_KIND
from fastprefix.tuning.configs.tuning_config import TuningConfig

PromptInit = Literal["random", "text", "vocab"]
Placement = Literal["prefix", "infix"]


_NETWORK = (
    *("encoder_reparameterization_type", "encoder_hidden_size"),
    *("encoder_num_layers", "encoder_dropout"),
)
_INITS: dict[str, PromptInit] = {"RANDOM": "random", "TEXT": "text", "SAMPLE_VOCAB": "vocab"}


@methods_refuse_unknown_arguments
@dataclass
class PromptConfig(TuningConfig):
    """Configuration of prompts that enter a model as embeddings.

    By default this is prompt tuning (Lester et al. 2021), which is also the embedding-only ablation
    of prefix tuning (Li and Liang 2021, section 7.2). With a reparameterisation it is P-tuning (Liu
    et al. 2021). With placement="infix" it is infix-tuning (Li and Liang 2021, section 7.3) on
    embeddings.

    Attributes:
        num_virtual_tokens: prompt length P.
        task_type: PEFT's name of the task; None leaves it open.
        placement: "prefix" puts the prompt in front of the text. "infix" puts it within the text,
            at the place that each call gives (infix_positions).
        encoder_reparameterization_type: "MLP" or "LSTM", a network that computes the prompt, as in
            PEFT's PromptEncoder. None trains the prompt itself.
        encoder_hidden_size: the network's hidden size; the embeddings' width if None.
        encoder_num_layers: the number of layers of the LSTM.
        encoder_dropout: the dropout between the LSTM's layers.
        modules_to_save: modules of the base of which copies are trained and saved with the prompt,
            by the ends of their names. If None, those that PEFT trains for the task.
        init: "random", "text" (the embeddings of init_text, repeated or cut to P tokens) or "vocab"
            (the embeddings of tokens drawn at random from the vocabulary).
        init_text: the text for init="text".
        init_std: the standard deviation of the random start. If None, it is 0.02 for a prompt
            itself, and 1 for the input of a network.
        inference_mode: if True, neither the prompt nor the modules saved with it are trained.

    Raises:
        TypeError: a field has the wrong type; the message names it.
        ValueError: a field has a value that is not accepted; the message names it.
    """

    placement: Placement = "prefix"
    encoder_reparameterization_type: Reparameterization | None = None
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    modules_to_save: list[str] | None = None
    init: PromptInit = "random"
    init_text: str | None = None
    init_std: float | None = None
    inference_mode: bool = False

    model_class: ClassVar[str] = "PromptTuningModel"
    peft_kinds: ClassVar[dict[str, tuple[str, ...]]] = {
        "PROMPT_TUNING": ("prompt_tuning_init", "prompt_tuning_init_text"),
        "P_TUNING": _NETWORK,
        INFIX_KIND: (),
    }

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method; for an infix, which PEFT does not have, our own."""
        if self.placement == "infix":
            return INFIX_KIND
        return "P_TUNING" if self.encoder_reparameterization_type else "PROMPT_TUNING"

    @classmethod
    def _from_peft_fields(cls, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        if kind == INFIX_KIND:
            return {"placement": "infix", **fields}
        if kind == "PROMPT_TUNING":
            start = fields.pop("prompt_tuning_init", "RANDOM")
            text = fields.pop("prompt_tuning_init_text", None)
            if start not in _INITS:
                raise ValueError(
                    f"config.prompt_tuning_init: got {start!r}, takes one of {tuple(_INITS)}"
                )
            fields |= {"init": _INITS[start], "init_text": text if start == "TEXT" else None}
        return fields

    def _peft_fields(self) -> dict[str, Any]:
        fields = super()._peft_fields()
        if self.peft_type == "P_TUNING":
            fields |= {name: getattr(self, name) for name in _NETWORK}
        if self.peft_type == "PROMPT_TUNING":
            # "TEXT" would make PEFT require the name of a tokenizer, which we do not know
            fields["prompt_tuning_init"] = "SAMPLE_VOCAB" if self.init == "vocab" else "RANDOM"
        return fields

    def __post_init__(self) -> None:
        self._check_shared_fields()
        check_number("encoder_dropout", self.encoder_dropout)
        if self.init_std is not None:
            check_number("init_std", self.init_std)
        network = (*get_args(Reparameterization), None)
        self._check_choice("placement", get_args(Placement))
        self._check_choice("encoder_reparameterization_type", network)
        self._check_choice("init", get_args(PromptInit))
        if self.encoder_reparameterization_type != "LSTM" and (
            self.encoder_num_layers != 2 or self.encoder_dropout != 0.0
        ):
            raise ValueError(
                f"encoder_num_layers, encoder_dropout: got {self.encoder_num_layers} and "
                f"{self.encoder_dropout}, which are the LSTM's, takes 2 and 0.0 without "
                "encoder_reparameterization_type='LSTM'"
            )
        if not 0.0 <= self.encoder_dropout < 1.0:
            raise ValueError(f"encoder_dropout: got {self.encoder_dropout}, takes 0 to under 1")
        if (self.init == "text") != bool(self.init_text):
            raise ValueError(
                f"init_text: got {self.init_text!r} with init={self.init!r}, takes a text with "
                "init='text', and None with any other"
            )
        if self.init_std is not None and not self.init_std >= 0.0:
            raise ValueError(f"init_std: got {self.init_std}, takes 0 or more")
