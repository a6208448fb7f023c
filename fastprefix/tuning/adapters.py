"""Several adapters on one model, by name; methods and rules are PEFT's."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel

from fastprefix.encoders import Encoder
from fastprefix.hf.peft_base import BASE_FOLDER
from fastprefix.tuning.base import TunedModel
from fastprefix.tuning.config import PrefixConfig

DEFAULT = "default"


class NamedAdapters(TunedModel):
    """Encoders by name. One of them is active, which is what a forward uses that names none.

    An adapter's parameters require gradients as in PEFT's LoRA: :meth:`set_adapter` trains the
    one it activates and freezes the others, a new one is frozen until then, and
    :meth:`set_requires_grad` trains several at a time.

    Attributes:
        encoders: the adapters' encoders.
        prefix_configs: their configurations.
        active_adapter: name of the active one.
    """

    encoders: nn.ModuleDict
    prefix_configs: dict[str, PrefixConfig]
    active_adapter: str

    def __init__(
        self, model: PreTrainedModel, adapter_name: str, config: PrefixConfig, encoder: Encoder
    ) -> None:
        super().__init__(model)
        self.encoders = nn.ModuleDict()
        self.prefix_configs = {}
        self._adapters_disabled = False
        self._insert(adapter_name, config, encoder)
        self.set_adapter(adapter_name)

    @property
    def encoder(self) -> Encoder:
        """The active adapter's encoder."""
        encoder = self.encoders[self.active_adapter]
        assert isinstance(encoder, Encoder)
        return encoder

    @property
    def prefix_config(self) -> PrefixConfig:
        """The active adapter's configuration."""
        return self.prefix_configs[self.active_adapter]

    @property
    def peft_config(self) -> dict[str, PrefixConfig]:
        """All adapters' configurations by name; PEFT's name for it."""
        return self.prefix_configs

    @property
    def active_peft_config(self) -> PrefixConfig:
        """The active adapter's configuration; PEFT's name for it."""
        return self.prefix_config

    @property
    def active_adapters(self) -> list[str]:
        """The name of the active adapter, in a list as in PEFT."""
        return [self.active_adapter]

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Makes an adapter the active one, and the only one that is trained.

        Args:
            adapter_name: which.
            inference_mode: do not train it either.

        Raises:
            ValueError: no adapter of this name.
        """
        self._check_known("adapter_name", [adapter_name])
        self.active_adapter = adapter_name
        self.encoders.requires_grad_(False)
        self.encoders[adapter_name].requires_grad_(not inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Iterable[str], requires_grad: bool = True
    ) -> None:
        """Trains adapters, or freezes them, whichever is active: those of a mixed batch, say.

        Raises:
            ValueError: no adapter of a name.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_known("adapter_names", names)
        for name in names:
            self.encoders[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was active, the first of the others is then, with a warning.

        Raises:
            ValueError: no adapter of this name, or no other one.
        """
        self._check_known("adapter_name", [adapter_name])
        others = [name for name in self.encoders if name != adapter_name]
        if not others:
            raise ValueError(
                f"adapter_name: got {adapter_name!r}, the only adapter; add another one first, or "
                "unpatch the model to have it without"
            )
        trained = any(parameter.requires_grad for parameter in self.encoder.parameters())
        del self.encoders[adapter_name], self.prefix_configs[adapter_name]
        if adapter_name == self.active_adapter:
            warnings.warn(
                f"adapter {adapter_name!r} was active; now {others[0]!r} is", stacklevel=2
            )
            self.set_adapter(others[0], inference_mode=not trained)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """In this block the model is its base alone. A LoRA inside the base stays."""
        before = self._adapters_disabled
        self._adapters_disabled = True
        try:
            yield
        finally:
            self._adapters_disabled = before

    def _insert(self, adapter_name: str, config: PrefixConfig, encoder: Encoder) -> None:
        """Adds an encoder, frozen, in the mode of the model.

        Raises:
            ValueError: the name is in use, or cannot be one.
        """
        self._check_new(adapter_name)
        self.encoders[adapter_name] = encoder.requires_grad_(False).train(self.training)
        self.prefix_configs[adapter_name] = config

    def _check_new(self, adapter_name: str) -> None:
        if adapter_name in self.encoders:
            raise ValueError(f"adapter_name: got {adapter_name!r}, which there is already")
        # a folder's name and a part of a parameter's
        if not adapter_name or set(adapter_name) & set("./\\") or adapter_name == BASE_FOLDER:
            raise ValueError(
                f"adapter_name: got {adapter_name!r}, takes a name without '.', '/' and '\\', "
                f"other than {BASE_FOLDER!r}"
            )
        if hasattr(nn.ModuleDict(), adapter_name):
            raise ValueError(
                f"adapter_name: got {adapter_name!r}, takes none that torch.nn.ModuleDict has"
            )

    def _check_known(self, argument: str, names: Sequence[str | None]) -> None:
        known = list(self.encoders)
        for name in names:
            if name not in known:
                raise ValueError(f"{argument}: got {name!r}, takes one of {known}")

    def _check_rows(self, prefix_names: Sequence[str | None], rows: int | None) -> None:
        """prefix_names: a known name or None for each row, rows of them unless None."""
        if self._adapters_disabled:
            raise ValueError("prefix_names: got names while adapters are disabled")
        if rows is not None and len(prefix_names) != rows:
            raise ValueError(
                f"prefix_names: got {len(prefix_names)} names, takes {rows}, one for each row of "
                "the batch"
            )
        self._check_known("prefix_names", [name for name in prefix_names if name is not None])
