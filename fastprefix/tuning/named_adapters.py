"""Several adapters on one model, by name; methods and rules are PEFT's."""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprefix.arguments import check_names, check_type, methods_refuse_unknown_arguments
from fastprefix.hf.peft_base import BASE_FOLDER
from fastprefix.tuning.heads import (
    Heads,
    HeadsInUse,
    check_checkpointing,
    find_heads,
    in_layers,
    keep_heads,
)
from fastprefix.tuning.tuned_model import TunedModel

DEFAULT = "default"
# What trl's trainers call the adapter that holds the policy as it was before they train it.
REFERENCE = "ref"

# In which models adapters are disabled, by id: a `disable_adapter` block belongs to its thread.
_DISABLED = threading.local()


@methods_refuse_unknown_arguments
class NamedAdapters(TunedModel):
    """Encoders by name. One of them is active, which is what a forward uses that names none.

    With an encoder go its heads: an adapter trains copies of its own of the modules that its
    configuration names (``modules_to_save``) or that its task needs, as in PEFT. The base's own are
    for adapters without, and for the base alone.

    An adapter's parameters require gradients as in PEFT's LoRA: :meth:`set_adapter` trains the
    one it activates and freezes the others, a new one is frozen until then, and
    :meth:`set_requires_grad` trains several at a time.

    Attributes:
        encoders: the adapters' encoders.
        adapter_heads: the heads of those that train any.
        active_adapter: name of the active one; None once the last one was deleted.
    """

    encoders: nn.ModuleDict
    adapter_heads: nn.ModuleDict
    active_adapter: str | None
    _disabled_for_replica = False

    def __init__(
        self, model: PreTrainedModel, adapter_name: str, config: Any, encoder: nn.Module
    ) -> None:
        super().__init__(model)
        self.encoders = nn.ModuleDict()
        self.adapter_heads = nn.ModuleDict()
        self._configs: dict[str, Any] = {}
        self._insert(adapter_name, config, encoder)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        for heads in map(self._heads, self.encoders):
            if heads is not None:
                heads.attach(self.base_model)

    def add_adapter(
        self,
        adapter_name: str,
        config: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Adds an adapter, neither active nor trained until :meth:`set_adapter`.

        Its heads start as the base's own.

        The name "ref" is trl's: with the configuration of "default" itself it is a copy of that
        adapter as it stands, heads included, which trl's trainers compare the policy with.

        Args:
            adapter_name: a new name.
            config: of the kind that the model was made with, or PEFT's for such adapters.
            tokenizer: the base's; needed for init="text".

        Raises:
            ValueError: the name is in use or cannot be one, init="text" without a tokenizer, or a
                copy for trl of a model in which more is trained than prefixes, prompts and heads.
        """
        self._check_new(adapter_name)
        if adapter_name == REFERENCE and config is self._configs.get(DEFAULT):
            self._check_reference()
            self._insert(adapter_name, config, copy.deepcopy(self.encoders[DEFAULT]))
            self._load_heads(adapter_name, self.heads(DEFAULT))
            return
        self._insert(adapter_name, *self._made(config, tokenizer))

    def _made(
        self, config: Any, tokenizer: PreTrainedTokenizerBase | None
    ) -> tuple[Any, nn.Module]:
        """Our configuration, of ours or PEFT's, and an encoder at its start."""
        raise NotImplementedError

    def _check_reference(self) -> None:
        """A reference has an encoder and heads of its own, and everything else in common."""
        inside = [name for name, _ in self.base_model.named_parameters() if ".default." in name]
        if inside:
            raise ValueError(
                f"ref_model: got None for a model in which {inside[0]} is trained beside the "
                "adapter, or may be; takes a model to compare with, where the trainer has that "
                "argument, for a copy of the adapter would be a reference that changes"
            )

    @property
    def active_adapters(self) -> list[str]:
        """The name of the active adapter, in a list as in PEFT; an empty one for none."""
        return [] if self.active_adapter is None else [self.active_adapter]

    @property
    def peft_config(self) -> dict[str, Any]:
        """All adapters' configurations by name; PEFT's name for it."""
        return self._configs

    @property
    def active_peft_config(self) -> Any:
        """The active adapter's configuration; PEFT's name for it."""
        return self._configs[self._named(None)]

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
        self.set_requires_grad(list(self.encoders), False)
        self.set_requires_grad(adapter_name, not inference_mode)

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
            if name in self.adapter_heads:
                self.adapter_heads[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was active, the first of the others is then, with a warning.

        After the last one none is active: a forward is then refused until another is added and
        set, but for that of the base, under :meth:`disable_adapter`.

        Raises:
            ValueError: no adapter of this name.
        """
        self._check_known("adapter_name", [adapter_name])
        trained = any(p.requires_grad for p in self.encoders[adapter_name].parameters())
        del self.encoders[adapter_name], self._configs[adapter_name]
        if adapter_name in self.adapter_heads:
            del self.adapter_heads[adapter_name]
        if adapter_name != self.active_adapter:
            return
        self.active_adapter = next(iter(self.encoders), None)
        if self.active_adapter is not None:
            warnings.warn(
                f"adapter {adapter_name!r} was active; now {self.active_adapter!r} is",
                stacklevel=2,
            )
            self.set_adapter(self.active_adapter, inference_mode=not trained)

    def heads(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """What an adapter trains of the base, by the names of the base's ``state_dict``.

        Args:
            adapter_name: which; the active one if None.

        Raises:
            ValueError: no adapter of this name.
        """
        heads = self._heads(self._named(adapter_name))
        return {} if heads is None else heads.tensors()

    def head_names(self, adapter_name: str | None = None) -> list[str] | None:
        """These modules by the last part of their names; None if there are none.

        Args:
            adapter_name: which; the active one if None.

        Raises:
            ValueError: no adapter of this name.
        """
        heads = self._heads(self._named(adapter_name))
        return None if heads is None else sorted({n.rpartition(".")[2] for n in heads.names})

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """In this block, and in this thread, the model is its base alone, heads included.

        A LoRA inside the base stays.
        """
        name, before = f"in_{id(self)}", self._adapters_disabled
        setattr(_DISABLED, name, True)
        try:
            yield
        finally:
            if not before:
                delattr(_DISABLED, name)

    @property
    def _adapters_disabled(self) -> bool:
        return getattr(_DISABLED, f"in_{id(self)}", self._disabled_for_replica)

    def _replicate_for_data_parallel(self) -> Any:
        """A replica runs in another thread, and is disabled as its original is in this one."""
        replica: Any = super()._replicate_for_data_parallel()
        replica._disabled_for_replica = self._adapters_disabled
        return replica

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """See :meth:`TunedModel.activation_checkpointing_enable`."""
        chosen = activation_checkpointing_kwargs or {"use_reentrant": False}
        names = [name for heads in map(self._heads, self.encoders) if heads for name in heads.names]
        if in_layers(names) and chosen.get("use_reentrant") is False:
            chosen = {"context_fn": keep_heads, **chosen}
        super().activation_checkpointing_enable(chosen, **kwargs)

    def _load_heads(self, adapter_name: str, heads: dict[str, Tensor]) -> None:
        """Puts saved heads, for which :func:`check_saved` found places, into an adapter's."""
        own = self._heads(adapter_name)
        if own is not None:
            own.load_state_dict(heads, strict=False)  # what the file leaves out is the base's

    def _as_trained(
        self, configs: Mapping[str, Any], active: str | None, is_trainable: bool
    ) -> None:
        """As a checkpoint left it, whose adapters and parameters are here."""
        for name, config in configs.items():
            self._configs[name] = replace(config, inference_mode=not is_trainable)
        self.set_adapter(active or next(iter(configs)))
        if not is_trainable:
            self.requires_grad_(False)
        self.train(is_trainable)

    def _insert(self, adapter_name: str, config: Any, encoder: nn.Module) -> None:
        """Adds an encoder and its heads, frozen, in the mode of the model.

        Raises:
            ValueError: the name is in use, or cannot be one.
        """
        self._check_new(adapter_name)
        names = find_heads(self.base_model, config.modules_to_save, config.task_type)
        self.encoders[adapter_name] = encoder.requires_grad_(False).train(self.training)
        if names:
            heads = Heads(self.base_model, names)
            self.adapter_heads[adapter_name] = heads.requires_grad_(False).train(self.training)
        self._configs[adapter_name] = config

    def _heads(self, adapter_name: str | None) -> Heads | None:
        """An adapter's heads; None if it has none, or of no adapter."""
        if adapter_name is None or adapter_name not in self.adapter_heads:
            return None
        heads = self.adapter_heads[adapter_name]
        assert isinstance(heads, Heads)
        return heads

    def _use_heads(self, names: Sequence[str | None]) -> contextlib.AbstractContextManager[None]:
        """A block in which the base runs with the heads of an adapter, or of each row's.

        Raises:
            ValueError: gradient checkpointing would run a head in the backward, with others then.
        """
        if not self.adapter_heads:
            return contextlib.nullcontext()
        rows = [self._heads(name) for name in names]
        if self.training and torch.is_grad_enabled():
            for heads in {id(heads): heads for heads in rows if heads}.values():
                check_checkpointing(self.base_model, heads.names)
        return HeadsInUse(self.base_model, rows)

    def _named(self, adapter_name: str | None) -> str:
        """An adapter that there is: the active one if None."""
        if adapter_name is not None:
            self._check_known("adapter_name", [adapter_name])
            return adapter_name
        if self.active_adapter is None:
            raise ValueError(
                "active_adapter: got none, takes one: add_adapter() and set_adapter() bring one, "
                "disable_adapter() runs the base alone"
            )
        return self.active_adapter

    def _check_new(self, adapter_name: str) -> None:
        check_type("adapter_name", adapter_name, str, "a name")
        if adapter_name in self.encoders:
            raise ValueError(
                f"adapter_name: got {adapter_name!r}, which there is already, takes a new name"
            )
        # a folder's name and a part of a parameter's
        if not adapter_name or set(adapter_name) & set("./\\\0") or adapter_name == BASE_FOLDER:
            raise ValueError(
                f"adapter_name: got {adapter_name!r}, takes a name without '.', '/', '\\' and NUL, "
                f"other than {BASE_FOLDER!r}"
            )
        length = len(adapter_name.encode("utf-8", "surrogatepass"))
        if length > 255 or adapter_name.encode("utf-8", "replace").decode() != adapter_name:
            raise ValueError(
                f"adapter_name: got one of {length} bytes, takes one that a folder can have: UTF-8 "
                "of up to 255 bytes"
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
        check_names("prefix_names", prefix_names, "a name, or None, for each row of the batch")
        if self._adapters_disabled:
            raise ValueError(
                "prefix_names: got names, takes None inside disable_adapter(), where no adapter is"
            )
        if rows is not None and len(prefix_names) != rows:
            raise ValueError(
                f"prefix_names: got {len(prefix_names)} names, takes {rows}, one for each row of "
                "the batch"
            )
        self._check_known("prefix_names", [name for name in prefix_names if name is not None])
