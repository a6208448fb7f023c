"""Saving adapters in folders, and loading adapters and checkpoints from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastprefix.arguments import methods_refuse_unknown_arguments
from fastprefix.files import written_together
from fastprefix.formats.source import Source
from fastprefix.tuning.adapter_names import DEFAULT
from fastprefix.tuning.checkpoint import (
    Checkpoint,
    load_state,
    read_checkpoint,
    refuse_checkpoint,
    restored_if_refused,
    without_start,
)
from fastprefix.tuning.configs.accepted import agreed
from fastprefix.tuning.configs.tuning_config import PeftConfigLike, TuningConfig
from fastprefix.tuning.named_adapters import NamedAdapters
from fastprefix.tuning.peft_base import (
    check_base_adapter,
    find_base_adapter,
    is_base_adapter,
    load_base_adapter,
    save_base_adapter,
    unwrap,
)
from fastprefix.tuning.saving_arguments import check_directory, check_loading

if TYPE_CHECKING:
    from typing_extensions import Self


@methods_refuse_unknown_arguments
class SavedAdapters(NamedAdapters):
    """Saving and loading, for prefixes and prompts alike.

    A subclass says what is written of an encoder (``_exported``) and how (``_write``), how that is
    read (``_read_adapter``) and put into an encoder (``_start_from``), and what its configurations
    are (``_as_config``).
    """

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        *,
        push_to_hub: bool = False,
    ) -> None:
        """Writes the adapters and their heads in PEFT's format.

        A network that computes a prefix or prompt is not written, as in PEFT. PEFT's format cannot
        hold everything. An infix is one example; :mod:`fastprefix.formats.peft_prefixes` lists the
        others. Such an adapter gets a peft_type of ours. PEFT refuses it, and
        :meth:`from_pretrained` reads it. A warning says where PEFT would compute something else
        with an adapter for long texts.

        The adapter "default" goes into the folder itself, any other into a sub-folder of its name.
        An adapter inside the base is written into the sub-folder "base_model" of each. All files of
        an adapter take their places together: if the process is killed, either the old files are
        there or the new ones. A model card, README.md, says what the folder holds and how to load
        it. If there is a card already, its text stays.

        Args:
            save_directory: created if it does not exist.
            safe_serialization: whether to write the weights as safetensors. If False,
                ``torch.save`` writes them; PEFT reads that file too.
            selected_adapters: names of the adapters to write; all if None.
            is_main_process: whether this process writes. If parameters are sharded, all processes
                must make the call, and one of them writes.
            push_to_hub: must be False; :meth:`push_to_hub` uploads.

        Raises:
            OSError: the files cannot be written.
            ValueError: there is no adapter of a name, or save_directory is a file; see also
                :func:`fastprefix.formats.peft_prefixes.save_adapter` and
                :func:`fastprefix.tuning.peft_base.check_base_adapter`.
        """
        if not isinstance(safe_serialization, bool):  # selected_adapters was once the second one
            safe_serialization, selected_adapters = True, safe_serialization
        selected = self._selected(selected_adapters, save_directory)
        check_directory(save_directory, push_to_hub)
        for name, place in selected:
            # every process must do this: each may hold a shard of the parameters
            exported, heads = self._exported(name), self.heads(name)
            if not is_main_process:
                continue
            check_base_adapter(place, self.base_model)
            with written_together(place) as partial:
                save_base_adapter(partial, self.base_model)
                self._write(partial, name, exported, heads, safe_serialization)
        if is_main_process:
            self.create_or_update_model_card(save_directory)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        *,
        low_cpu_mem_usage: bool = False,
        subfolder: str | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        """Adds a saved adapter, of fastprefix or PEFT. :meth:`set_adapter` makes it the active one.

        Args:
            model_id: a folder, or a repository name on the Hugging Face hub.
            adapter_name: a new name.
            is_trainable: whether to train it, in addition to those that are trained.
            torch_device: see :meth:`from_pretrained`.
            low_cpu_mem_usage: see :meth:`from_pretrained`.
            subfolder: see :meth:`from_pretrained`.
            revision: see :meth:`from_pretrained`.
            token: see :meth:`from_pretrained`.
            cache_dir: see :meth:`from_pretrained`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the name is in use or is refused; the files hold no adapter of this kind for
                this model; or the adapter was trained together with an adapter inside the base, and
                this base has another one or none.
        """
        check_loading(torch_device, low_cpu_mem_usage)
        place = Source(str(model_id), subfolder, revision, token, cache_dir)
        refuse_checkpoint(place, self.config_class.model_class)
        saved, config = self._read_adapter(place, self.base_model)
        inside = find_base_adapter(place)
        if inside is not None and not is_base_adapter(self.base_model, inside):
            raise ValueError(
                f"{place}: holds an adapter inside the base, too, which this base lacks "
                "or has other numbers in; load both by from_pretrained"
            )
        self.add_adapter(adapter_name, replace(config, inference_mode=not is_trainable))
        self._start_from(adapter_name, saved)
        self.set_requires_grad(adapter_name, is_trainable)

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str | Path,
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: TuningConfig | PeftConfigLike | None = None,
        *,
        torch_device: str | torch.device | None = None,
        low_cpu_mem_usage: bool = False,
        subfolder: str | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | None = None,
    ) -> Self:
        """Loads an adapter that fastprefix or PEFT saved.

        An adapter inside the base that was saved with it is loaded too. So is a checkpoint that
        transformers' Trainer wrote of such a model, with all its adapters and their networks.

        Args:
            model: the base; it is frozen.
            model_id: a folder, or a repository name on the Hugging Face hub.
            adapter_name: the name that the adapter gets.
            is_trainable: whether to train it further, and with it what is inside the base. A saved
                adapter is then trained directly, because its network was not saved.
            config: a configuration of this class, or PEFT's for such adapters, with which the files
                must agree.
            torch_device: a device, as in PEFT. It has no effect: adapters are on the base's device.
            low_cpu_mem_usage: as in PEFT. It has no effect: adapters are small.
            subfolder: the sub-folder of model_id that holds the files.
            revision: a branch, tag or commit of the repository.
            token: the hub's access token.
            cache_dir: where downloads go.

        Raises:
            FileNotFoundError: a file is missing.
            TypeError: config is no configuration for this class.
            ValueError: the files hold no adapter of this kind for this model, or config does not
                agree with them.
        """
        check_loading(torch_device, low_cpu_mem_usage)
        place = Source(str(model_id), subfolder, revision, token, cache_dir)
        return cls._load(model, place, adapter_name, is_trainable, config)

    @classmethod
    def _load(
        cls,
        model: PreTrainedModel,
        place: Source,
        adapter_name: str,
        is_trainable: bool,
        config: Any,
        fields: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Self:
        """See :meth:`from_pretrained`.

        Args:
            model: the base.
            place: where the files are.
            adapter_name: the name that the adapter gets.
            is_trainable: whether to train it further.
            config: the configuration that the caller expects; None for any.
            fields: fields of the configuration that no file holds.
            options: further arguments of this class.
        """
        fields, options = fields or {}, options or {}
        wanted = None if config is None else cls._as_config(config)
        model = unwrap(model)
        saved = read_checkpoint(place, cls.config_class.model_class)
        if saved is not None:
            saved = saved.called(adapter_name)
            return cls._load_checkpoint(model, saved, is_trainable, wanted, place, fields, options)
        with cls._base_as_tuned(model, {**fields, **options}):
            adapter, found = cls._read_adapter(place, model)
        if wanted is not None:
            found = agreed(wanted, found, place)
        found = replace(found, **fields, inference_mode=not is_trainable)
        inside = find_base_adapter(place)
        if inside is not None:
            load_base_adapter(model, inside, is_trainable=is_trainable)
        make: Any = cls
        tuned: Self = make(model, found, adapter_name=adapter_name, **options)
        tuned._start_from(adapter_name, adapter)
        if not is_trainable:
            tuned.requires_grad_(False)
        return tuned.train(is_trainable)

    @classmethod
    def _load_checkpoint(
        cls,
        model: PreTrainedModel,
        saved: Checkpoint,
        is_trainable: bool,
        wanted: Any,
        place: Source,
        fields: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> Self:
        """A model with all adapters of a checkpoint, by the names that they have in it."""
        kind: Any = cls.config_class
        settings = {name: {**one, **fields} for name, one in saved.adapters.items()}
        configs = {name: saved.config(kind, one) for name, one in settings.items()}
        first, *others = settings
        if wanted is not None:
            agreed(wanted, configs[saved.active or first], place)
        make: Any = cls
        with restored_if_refused(model, cls._undoing(model)):
            start = kind(**without_start(settings[first]))
            tuned: Self = make(model, start, adapter_name=first, **options)
            for name in others:
                tuned.add_adapter(name, kind(**without_start(settings[name])))
            load_state(tuned, saved)
        tuned._take_over_state(configs, saved.active, is_trainable)
        return tuned

    @classmethod
    def _as_config(cls, config: Any) -> Any:
        """Our configuration for ours or PEFT's.

        Raises:
            TypeError: it is no configuration for this class.
            ValueError: it configures another method, or has a field that we do not accept.
        """
        raise NotImplementedError

    @classmethod
    def _base_as_tuned(
        cls, model: PreTrainedModel, settings: Mapping[str, Any]
    ) -> AbstractContextManager[Any]:
        """A block in which a base is as this class needs it; afterwards it is as before."""
        return nullcontext()

    @classmethod
    def _undoing(cls, model: PreTrainedModel) -> Callable[[PreTrainedModel], object]:
        """A function that undoes what building this class changes in a base, besides freezing."""
        return lambda _: None

    def _exported(self, adapter_name: str) -> Any:
        """What is written of an adapter's encoder, gathered if it is sharded."""
        raise NotImplementedError

    def _shared_fields(self, adapter_name: str) -> dict[str, Any]:
        """Fields of adapter_config.json that all our adapters have."""
        return {
            "base_model_name_or_path": getattr(self.base_model, "name_or_path", None) or None,
            "modules_to_save": self.head_names(adapter_name),
            "task_type": self._configs[adapter_name].task_type,
        }

    def _write(
        self,
        folder: Path,
        adapter_name: str,
        exported: Any,
        heads: dict[str, Tensor],
        safe_serialization: bool,
    ) -> None:
        """Writes one adapter into a folder of its own."""
        raise NotImplementedError

    @classmethod
    def _read_adapter(cls, place: Source, model: PreTrainedModel) -> tuple[Any, Any]:
        """Reads a saved adapter for a base, and makes a configuration that trains it directly."""
        raise NotImplementedError

    def _start_from(self, adapter_name: str, saved: Any) -> None:
        """Puts an adapter that was read into one that was just added."""
        raise NotImplementedError

    def _selected(
        self, selected_adapters: Sequence[str] | None, folder: str | Path
    ) -> list[tuple[str, Path]]:
        """The adapters to save (all if None), each with its folder.

        Raises:
            ValueError: there is no adapter of a name, or none at all.
        """
        names = list(self.encoders) if selected_adapters is None else list(selected_adapters)
        self._check_known("selected_adapters", names)
        if not self.encoders:
            raise ValueError("selected_adapters: got none, takes some: the last one was deleted")
        return [(name, Path(folder) if name == DEFAULT else Path(folder) / name) for name in names]
