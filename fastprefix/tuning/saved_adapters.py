"""Adapters in folders: written by name, and added from such folders again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprefix.arguments import methods_refuse_unknown_arguments
from fastprefix.files import written_together
from fastprefix.hf.hub import Source
from fastprefix.hf.peft_base import (
    check_base_adapter,
    find_base_adapter,
    is_base_adapter,
    save_base_adapter,
)
from fastprefix.tuning import hub
from fastprefix.tuning.checkpoint import refuse_checkpoint
from fastprefix.tuning.named_adapters import DEFAULT, NamedAdapters


@methods_refuse_unknown_arguments
class SavedAdapters(NamedAdapters):
    """What prefixes and prompts have in common when they are saved and loaded.

    A subclass says what of an encoder is written (``_exported``), how (``_write``), and how it is
    read (``_read``, ``_start``).
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
        """Writes the adapters, and heads trained beside them, in PEFT's format.

        A network is dropped, as PEFT does. What PEFT's format cannot hold (an infix is one such
        thing, others are in :mod:`fastprefix.hf.peft_format`) gets a peft_type of ours, which PEFT
        refuses and only :meth:`from_pretrained` reads. Warns where PEFT computes something else
        with it for long texts.

        The adapter "default" goes into the folder itself, others into sub-folders of their names.
        An adapter inside the base is written beside each, into its sub-folder "base_model". All
        files of an adapter take their places together: a process that is killed leaves those of
        before, or the new ones. A model card, README.md, says what it is and how to load it; the
        text of one that is there stays.

        Args:
            save_directory: made if need be.
            safe_serialization: whether the weights are safetensors, or a file of ``torch.save``
                that PEFT reads, too.
            selected_adapters: by name; all if None.
            is_main_process: whether this process writes. Where parameters are sharded, all
                processes make the call, and one of them writes.
            push_to_hub: False; :meth:`push_to_hub` uploads.

        Raises:
            OSError: they cannot be written.
            ValueError: no adapter of a name, or the folder is a file; see also
                :func:`fastprefix.hf.peft_format.save_adapter` and
                :func:`fastprefix.hf.peft_base.check_base_adapter`.
        """
        if not isinstance(safe_serialization, bool):  # where selected_adapters stood before
            safe_serialization, selected_adapters = True, safe_serialization
        selected = self._selected(selected_adapters, save_directory)
        hub.check_directory(save_directory, push_to_hub)
        for name, place in selected:
            # by all processes, each of which may have a share of them
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
        """Adds an adapter that fastprefix or PEFT saved; not active until :meth:`set_adapter`.

        Args:
            model_id: a folder, or a repository name on the Hugging Face hub.
            adapter_name: a new name.
            is_trainable: whether to train it, beside those that are trained.
            torch_device: as in :meth:`from_pretrained`, and so those that follow.
            low_cpu_mem_usage: see there.
            subfolder: see there.
            revision: see there.
            token: see there.
            cache_dir: see there.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the name is in use or cannot be one, or not an adapter of this kind for this
                model, or one that was trained with an adapter inside the base that is not this
                base's.
        """
        hub.check_loading(torch_device, low_cpu_mem_usage)
        place = Source(str(model_id), subfolder, revision, token, cache_dir)
        refuse_checkpoint(place, self.config_class.model_class)
        saved, config = self._read(place)
        inside = find_base_adapter(place)
        if inside is not None and not is_base_adapter(self.base_model, inside):
            raise ValueError(
                f"{place}: holds an adapter inside the base, too, which this base lacks "
                "or has other numbers in; load both by from_pretrained"
            )
        self.add_adapter(adapter_name, replace(config, inference_mode=not is_trainable))
        self._start(adapter_name, saved)
        self.set_requires_grad(adapter_name, is_trainable)

    def _exported(self, adapter_name: str) -> Any:
        """What is written of an adapter's encoder, whole where it is sharded."""
        raise NotImplementedError

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

    def _read(self, place: Source) -> tuple[Any, Any]:
        """An adapter that was saved, and a configuration that trains it directly."""
        raise NotImplementedError

    def _start(self, adapter_name: str, saved: Any) -> None:
        """Gives an adapter that was just added the numbers of one that was read."""
        raise NotImplementedError

    def _selected(
        self, selected_adapters: Sequence[str] | None, folder: str | Path
    ) -> list[tuple[str, Path]]:
        """Adapters to save, all if None, and where: "default" in the folder itself.

        Raises:
            ValueError: no adapter of a name, or none at all.
        """
        names = list(self.encoders) if selected_adapters is None else list(selected_adapters)
        self._check_known("selected_adapters", names)
        if not self.encoders:
            raise ValueError("selected_adapters: got none, takes some: the last one was deleted")
        return [(name, Path(folder) if name == DEFAULT else Path(folder) / name) for name in names]
