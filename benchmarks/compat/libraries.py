"""fastprefix and PEFT behind one door, each through its public interface and given equal numbers.

:class:`Library` itself stands for the bare model without any prefix: what that cannot do either,
no library is blamed for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compat.architectures import Architecture
from compat.oracle import Prefix, Semantics, Slot
from fastprefix import PrefixConfig, PrefixKV, PrefixTuningModel, use_prefix

TASKS = {
    "decoder": "CAUSAL_LM",
    "encoder": "FEATURE_EXTRACTION",
    "vision": "FEATURE_EXTRACTION",
    "encoder-decoder": "SEQ_2_SEQ_LM",
}


class NotOfferedError(Exception):
    """The library has no such thing; the message says what is missing."""


def flat(prefix: Prefix) -> Tensor:
    """[P, width]: along a token's row, slot after slot, the key's heads, then the value's.

    Both libraries lay a learned prefix out so. Slots without a prefix have no columns.
    """
    parts = [part for pair in prefix for part in pair if part.shape[1]]
    return torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1)


class Tuned:
    """A model with a prefix (or, for the bare model, without one).

    Attributes:
        module: what a training loop would hold.
        note: what a user has to do to get this far, or "".
    """

    note = ""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        """The model's output."""
        return self.module(**inputs)

    def generate(self, **inputs: Any) -> Any:
        """Whatever the model's own generation returns."""
        generate: Any = self.module.generate
        return generate(**inputs)

    def checkpointing(self) -> None:
        """Switches gradient checkpointing on, as the Trainer does."""
        enable: Any = self.module.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def gradient(self) -> Tensor | None:
        """The prefix's gradient, laid out as :func:`flat` does; None where none arrived."""
        return None

    def save(self, folder: Path) -> None:
        """Writes the adapter."""
        save: Any = self.module.save_pretrained
        save(folder)


class Library:
    """A library, or none: the bare model.

    Attributes:
        name: in the table.
    """

    name = "transformers"

    def groups(self, architecture: Architecture) -> tuple[str, ...]:
        """Where the library can put a prefix."""
        return ()

    def semantics(self, architecture: Architecture, length: int) -> Semantics:
        """What the library documents about positions and windows for P = length."""
        return Semantics(0)

    def effective(self, slots: tuple[Slot, ...], prefix: Prefix) -> Prefix | None:
        """The prefix that the model gets out of these numbers by the library's own layout."""
        return None

    def tune(
        self,
        architecture: Architecture,
        model: PreTrainedModel,
        prefixes: dict[str, Prefix],
        training: bool = False,
    ) -> Tuned:
        """Gives the model prefixes; groups whose slots have no tokens get none.

        Args:
            architecture: of the model.
            model: changed in place.
            prefixes: the numbers by name; the first one is active.
            training: whether `Tuned.module` will be used as a training loop does.
        """
        return Tuned(model)

    def load(self, model: PreTrainedModel, folder: Path) -> Tuned:
        """Reads what `Tuned.save` wrote."""
        return Tuned(model)

    @contextmanager
    def rows(
        self,
        architecture: Architecture,
        model: PreTrainedModel,
        prefixes: dict[str, Prefix],
        names: list[str | None],
    ) -> Iterator[Tuned]:
        """A model with several prefixes by name, of which each row of a batch has its own."""
        yield Tuned(model)


# Encoders whose text fastprefix places behind the prefix, as PEFT does; in others it stays.
_BEHIND = ("bert", "roberta", "electra")


class FastPrefix(Library):
    """This library: inference through `use_prefix`, training through `PrefixTuningModel`."""

    name = "fastprefix"

    def groups(self, architecture: Architecture) -> tuple[str, ...]:
        return ("encoder", "decoder", "cross")

    def semantics(self, architecture: Architecture, length: int) -> Semantics:
        """The defaults of `PrefixConfig.position_offset`."""
        behind = architecture.family == "decoder" or architecture.name in _BEHIND
        return Semantics(length if behind else 0)

    def effective(self, slots: tuple[Slot, ...], prefix: Prefix) -> Prefix | None:
        return prefix

    def tune(
        self,
        architecture: Architecture,
        model: PreTrainedModel,
        prefixes: dict[str, Prefix],
        training: bool = False,
    ) -> Tuned:
        (prefix,) = prefixes.values()
        kv = self._kv(architecture, prefix)
        if not training:
            return _UsingPrefix(model, kv)
        config = PrefixConfig(
            num_virtual_tokens=kv.num_virtual_tokens,
            task_type=TASKS[architecture.family],
            position_offset=kv.position_offset,
        )
        tuned = PrefixTuningModel(model, config)
        tuned.encoder.start_from(flat(prefix))
        return _Trained(tuned)

    def load(self, model: PreTrainedModel, folder: Path) -> Tuned:
        return _Trained(PrefixTuningModel.from_pretrained(model, folder))

    @contextmanager
    def rows(
        self,
        architecture: Architecture,
        model: PreTrainedModel,
        prefixes: dict[str, Prefix],
        names: list[str | None],
    ) -> Iterator[Tuned]:
        kv: Any = {name: self._kv(architecture, prefix) for name, prefix in prefixes.items()}
        rows: dict[str, Any] = {"rows": names}
        with use_prefix(model, kv, **rows):
            yield Tuned(model)

    def _kv(self, architecture: Architecture, prefix: Prefix) -> PrefixKV:
        keys, values = zip(*prefix, strict=True)
        length = max(key.shape[1] for key in keys)
        return PrefixKV(keys, values, self.semantics(architecture, length).offset)


class _UsingPrefix(Tuned):
    def __init__(self, model: PreTrainedModel, kv: PrefixKV) -> None:
        super().__init__(model)
        self.model, self.kv = model, kv

    def forward(self, **inputs: Any) -> Any:
        with use_prefix(self.model, self.kv):
            return self.model(**inputs)

    def generate(self, **inputs: Any) -> Any:
        with use_prefix(self.model, self.kv):
            return super().generate(**inputs)


class _Trained(Tuned):
    def gradient(self) -> Tensor | None:
        encoder: Any = self.module.encoder
        return encoder.embedding.grad


class Peft(Library):
    """Hugging Face PEFT: `get_peft_model` with a `PrefixTuningConfig`."""

    name = "PEFT"

    def groups(self, architecture: Architecture) -> tuple[str, ...]:
        return ("decoder",) if architecture.family == "encoder-decoder" else ("encoder", "decoder")

    def semantics(self, architecture: Architecture, length: int) -> Semantics:
        """The prefix is the start of the cache: positions, windows and biases count it as text."""
        cached = architecture.family == "encoder-decoder"
        return Semantics(length, in_window=True, cached=cached)

    def effective(self, slots: tuple[Slot, ...], prefix: Prefix) -> Prefix | None:
        """In encoder-decoders every second layer's numbers are laid out for no layer."""
        own = [i for i, slot in enumerate(slots) if slot.group == "decoder"]
        if len(own) in (0, len(slots)):
            return prefix
        used = list(prefix)
        for layer, slot in enumerate(own):
            used[slot] = prefix[own[2 * layer % len(own)]]
        return used

    def tune(
        self,
        architecture: Architecture,
        model: PreTrainedModel,
        prefixes: dict[str, Prefix],
        training: bool = False,
    ) -> Tuned:
        tuned: Any = None
        for name, prefix in prefixes.items():
            used = [key for key, _ in prefix if key.shape[1]]
            heads, length, size = used[0].shape
            by_hand: dict[str, int] = {}
            if architecture.name in ("distilbert", "falcon-mq"):
                by_hand = {"num_attention_heads": heads, "token_dim": heads * size}
            elif len(used) != model.config.num_hidden_layers:
                by_hand = {"num_layers": len(used)}
            config = peft.PrefixTuningConfig(
                task_type=TASKS[architecture.family], num_virtual_tokens=length, **by_hand
            )
            if tuned is None:
                tuned = peft.get_peft_model(model, config, adapter_name=name)
            else:
                tuned.add_adapter(name, config)
            embedding = tuned.prompt_encoder[name].embedding.weight
            numbers = flat(prefix)
            if embedding.shape != numbers.shape:
                raise NotOfferedError(
                    f"PEFT makes a prefix of shape {list(embedding.shape)} for layers that take "
                    f"{list(numbers.shape)}"
                )
            with torch.no_grad():
                embedding.copy_(numbers)
        tuned.eval()
        found = _PeftTuned(tuned)
        if by_hand:
            found.note = f"{' and '.join(by_hand)} given by hand, which PEFT derives elsewhere"
        return found

    def load(self, model: PreTrainedModel, folder: Path) -> Tuned:
        return _PeftTuned(peft.PeftModel.from_pretrained(model, folder))

    @contextmanager
    def rows(
        self,
        architecture: Architecture,
        model: PreTrainedModel,
        prefixes: dict[str, Prefix],
        names: list[str | None],
    ) -> Iterator[Tuned]:
        tuned = self.tune(architecture, model, prefixes)
        yield _WithNames(tuned.module, ["__base__" if name is None else name for name in names])


class _PeftTuned(Tuned):
    def gradient(self) -> Tensor | None:
        encoders: Any = self.module.prompt_encoder
        return encoders["default"].embedding.weight.grad


class _WithNames(Tuned):
    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__(module)
        self.names = names

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs, adapter_names=self.names)

    def generate(self, **inputs: Any) -> Any:
        generate: Any = self.module.generate
        return generate(**inputs, adapter_names=self.names)


BARE = Library()
LIBRARIES: dict[str, Library] = {library.name: library for library in (FastPrefix(), Peft())}
