"""Several adapters on one model, by name. Methods and rules are those of PEFT."""

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

from fastprefix.arguments import check_names, methods_refuse_unknown_arguments
from fastprefix.tuning.adapter_names import DEFAULT, REFERENCE, check_new_name
from fastprefix.tuning.find_heads import find_heads
from fastprefix.tuning.heads import (
    Heads,
    HeadsInUse,
    check_checkpointing,
    in_layers,
    keep_heads,
)
from fastprefix.tuning.tuned_model import TunedModel

# The models, by id, in which adapters are disabled: a `disable_adapter` block affects one thread.
_DISABLED = threading.local()


@methods_refuse_unknown_arguments
class NamedAdapters(TunedModel):
    """Encoders by name. One of them is active: a forward uses it unless the call names others.

    An adapter is an encoder and its heads. Heads are the adapter's own copies of the modules that
    its configuration names (``modules_to_save``) or that its task needs, as in PEFT. An adapter
    without heads, and the base without an adapter, use the base's own modules.

    Which parameters require gradients follows PEFT's LoRA: :meth:`set_adapter` trains the adapter
    that it activates and freezes the others. A new adapter is frozen until then.
    :meth:`set_requires_grad` trains several adapters at a time.

    Attributes:
        encoders: the adapters' encoders.
        adapter_heads: the heads of the adapters that have any.
        active_adapter: name of the active adapter; None after the last one was deleted.
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
        """Adds an adapter. It is neither active nor trained until :meth:`set_adapter`.

        Its heads start as copies of the base's modules.

        The name "ref" is reserved by trl. Together with the very configuration object of "default"
        it asks for a copy of that adapter in its present state, heads included. trl's trainers
        compare the policy with it.

        Args:
            adapter_name: a new name.
            config: a configuration of this model's class, or PEFT's for such adapters.
            tokenizer: the base's; needed for init="text".

        Raises:
            ValueError: the name is in use or cannot be one, init="text" without a tokenizer, or a
                copy for trl of a model in which more is trained than prefixes, prompts and heads.
        """
        check_new_name(adapter_name, list(self.encoders))
        if adapter_name == REFERENCE and config is self._configs.get(DEFAULT):
            self._check_reference()
            self._insert(adapter_name, config, copy.deepcopy(self.encoders[DEFAULT]))
            self._load_heads(adapter_name, self.heads(DEFAULT))
            return
        self._insert(adapter_name, *self._new_adapter(config, tokenizer))

    def _new_adapter(
        self, config: Any, tokenizer: PreTrainedTokenizerBase | None
    ) -> tuple[Any, nn.Module]:
        """Our configuration for ours or PEFT's, and an untrained encoder for it."""
        raise NotImplementedError

    def _check_reference(self) -> None:
        """Refuses a reference in a model that trains more than encoders and heads.

        A reference shares everything else with the policy, and would change with it.
        """
        inside = [name for name, _ in self.base_model.named_parameters() if ".default." in name]
        if inside:
            raise ValueError(
                f"ref_model: got None for a model in which {inside[0]} is trained beside the "
                "adapter, or may be; takes a model to compare with, where the trainer has that "
                "argument, for a copy of the adapter would be a reference that changes"
            )

    @property
    def active_adapters(self) -> list[str]:
        """The name of the active adapter, in a list as in PEFT; empty if none is active."""
        return [] if self.active_adapter is None else [self.active_adapter]

    @property
    def peft_config(self) -> dict[str, Any]:
        """All adapters' configurations by name, as in PEFT."""
        return self._configs

    @property
    def active_peft_config(self) -> Any:
        """The active adapter's configuration, as in PEFT."""
        return self._configs[self._known_name(None)]

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Makes an adapter the active one, and the only one that is trained.

        Args:
            adapter_name: the adapter.
            inference_mode: if True, it is not trained either.

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
        """Trains adapters, or freezes them. The active adapter stays the same.

        To train on batches whose rows have different adapters, train all of those.

        Args:
            adapter_names: one name or several.
            requires_grad: whether to train them.

        Raises:
            ValueError: there is no adapter of one of the names.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_known("adapter_names", names)
        for name in names:
            self.encoders[name].requires_grad_(requires_grad)
            if name in self.adapter_heads:
                self.adapter_heads[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was active, the first of the others becomes so, with a warning.

        After the last adapter is removed, none is active. A forward is then refused until an
        adapter is added and set. Only the base's own forward, under :meth:`disable_adapter`, runs.

        Raises:
            ValueError: there is no adapter of this name.
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
        """The tensors of an adapter's heads, by the names of the base's ``state_dict``.

        Args:
            adapter_name: the adapter; the active one if None.

        Raises:
            ValueError: there is no adapter of this name.
        """
        heads = self._heads(self._known_name(adapter_name))
        return {} if heads is None else heads.tensors()

    def head_names(self, adapter_name: str | None = None) -> list[str] | None:
        """The last parts of the names of an adapter's heads; None if it has none.

        Args:
            adapter_name: the adapter; the active one if None.

        Raises:
            ValueError: there is no adapter of this name.
        """
        heads = self._heads(self._known_name(adapter_name))
        return None if heads is None else sorted({n.rpartition(".")[2] for n in heads.names})

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A block in which, for this thread, the model is its base without prefix and heads.

        A LoRA inside the base stays active.
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
        """A replica runs in another thread; it is disabled if its original is in this one."""
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
        """Loads saved heads into an adapter's; :func:`check_saved_heads` has accepted them."""
        own = self._heads(adapter_name)
        if own is not None:
            own.load_state_dict(heads, strict=False)  # tensors that the file lacks stay the base's

    def _take_over_state(
        self, configs: Mapping[str, Any], active: str | None, is_trainable: bool
    ) -> None:
        """Completes a model with a checkpoint's parameters: configurations, active adapter, mode.

        Args:
            configs: the checkpoint's configurations by name.
            active: the name of its active adapter; None for the first.
            is_trainable: whether to train the active adapter; if False, nothing is trained.
        """
        for name, config in configs.items():
            self._configs[name] = replace(config, inference_mode=not is_trainable)
        self.set_adapter(active or next(iter(configs)))
        if not is_trainable:
            self.requires_grad_(False)
        self.train(is_trainable)

    def _insert(self, adapter_name: str, config: Any, encoder: nn.Module) -> None:
        """Adds an encoder and its heads, frozen, in the model's mode (training or not).

        Raises:
            ValueError: the name is in use, or is refused.
        """
        check_new_name(adapter_name, list(self.encoders))
        names = find_heads(self.base_model, config.modules_to_save, config.task_type)
        self.encoders[adapter_name] = encoder.requires_grad_(False).train(self.training)
        if names:
            heads = Heads(self.base_model, names)
            self.adapter_heads[adapter_name] = heads.requires_grad_(False).train(self.training)
        self._configs[adapter_name] = config

    def _heads(self, adapter_name: str | None) -> Heads | None:
        """An adapter's heads; None if it has none, or if adapter_name is None."""
        if adapter_name is None or adapter_name not in self.adapter_heads:
            return None
        heads = self.adapter_heads[adapter_name]
        assert isinstance(heads, Heads)
        return heads

    def _use_heads(self, names: Sequence[str | None]) -> contextlib.AbstractContextManager[None]:
        """A block in which the base runs with an adapter's heads, or with those of each row.

        Args:
            names: one adapter for all rows, or one for each row; None stands for the base's own.

        Raises:
            ValueError: gradient checkpointing would rerun a head in the backward, after this block.
        """
        if not self.adapter_heads:
            return contextlib.nullcontext()
        rows = [self._heads(name) for name in names]
        if self.training and torch.is_grad_enabled():
            for heads in {id(heads): heads for heads in rows if heads}.values():
                check_checkpointing(self.base_model, heads.names)
        return HeadsInUse(self.base_model, rows)

    def _known_name(self, adapter_name: str | None) -> str:
        """The name of an existing adapter: the given one, or the active one if None.

        Raises:
            ValueError: there is no such adapter.
        """
        if adapter_name is not None:
            self._check_known("adapter_name", [adapter_name])
            return adapter_name
        if self.active_adapter is None:
            raise ValueError(
                "active_adapter: got none, takes one: add_adapter() and set_adapter() bring one, "
                "disable_adapter() runs the base alone"
            )
        return self.active_adapter

    def _check_known(self, argument: str, names: Sequence[str | None]) -> None:
        known = list(self.encoders)
        for name in names:
            if name not in known:
                raise ValueError(f"{argument}: got {name!r}, takes one of {known}")

    def _check_rows(self, prefix_names: Sequence[str | None], rows: int | None) -> None:
        """Checks names for the rows of a batch.

        Args:
            prefix_names: for each row a known name, or None.
            rows: how many there must be; None if that is not known.
        """
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
