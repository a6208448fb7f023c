"""Configurations as PEFT's: dictionaries, files, and conversion from PEFT's own objects."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fastprefix.arguments import methods_refuse_unknown_arguments
from fastprefix.files import json_text, written_whole
from fastprefix.hf.hub import Source
from fastprefix.hf.peft_files import CONFIG_FILE, read_about, read_config

if TYPE_CHECKING:
    from typing_extensions import Self

# What our fields are called in a file, where PEFT's cannot say all of it.
_OURS = "fastprefix"
# Fields of PEFT's that say nothing about a prefix to be trained: where it comes from, and what
# the model tells. Some are in files of ours alone.
_ASIDE = {
    *("auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision"),
    *("num_attention_heads", "num_layers", "num_transformer_submodules", "token_dim"),
    *("not_peft", "kind", "tokenizer_kwargs", "tokenizer_name_or_path", _OURS),
}


class PeftsOwn(Protocol):
    """A configuration object of PEFT's."""

    peft_type: Any

    def to_dict(self) -> dict[str, Any]:
        """All fields."""


@methods_refuse_unknown_arguments
class ConfigFiles:
    """What a dataclass of a configuration takes from this: PEFT's methods, and PEFT's fields.

    Attributes:
        peft_kinds: the peft_types that this configuration stands for, and by PEFT's names what is
            taken of each beside what all have.
        model_class: the class of ours that it is for, for messages.
    """

    peft_kinds: ClassVar[Mapping[str, Collection[str]]]
    model_class: ClassVar[str]

    @property
    def is_prompt_learning(self) -> bool:
        """True, as of PEFT's configurations of prefixes and prompts."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """All fields, and ``peft_type``."""
        told: Any = self
        return {"peft_type": told.peft_type, **asdict(told)}

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes adapter_config.json, for :meth:`from_pretrained` and PEFT's.

        What PEFT has no field for stands in an entry of its own, of which PEFT says that it does
        not know it.

        Args:
            save_directory: made if need be.

        Raises:
            OSError: it cannot be written.
            ValueError: the folder is a file.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory: got the file {folder}, takes a folder")
        told = self._peft_fields()
        if not self._is_told_by(told):
            whole: Any = self
            told[_OURS] = asdict(whole)
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / CONFIG_FILE) as partial:
            partial.write_text(json_text(told), encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | None = None,
    ) -> Self:
        """Reads an adapter_config.json that :meth:`save_pretrained`, PEFT or a tuned model wrote.

        Args:
            pretrained_model_name_or_path: a folder, or a repository name on the hub.
            subfolder: of it, where the file is.
            revision: of the repository: a branch, tag or commit.
            token: the hub's.
            cache_dir: where downloads go.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: of another peft_type, or with a field that is not taken.
        """
        name = str(pretrained_model_name_or_path)
        place = Source(name, subfolder, revision, token, cache_dir)
        told, file = read_config(place, cls.peft_kinds)
        try:
            if isinstance(told.get(_OURS), dict):
                return cls(**told[_OURS])
            return cls.from_peft({**told, **cls._beside(read_about(place))})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_peft(cls, config: Any) -> Self:
        """Of PEFT's configuration, as an object or as the fields of its file.

        What training starts from is ours, but for a text, the vocabulary, or zeros: PEFT's random
        numbers have a standard deviation of 1.

        Raises:
            ValueError: for another method, or a field of it has a value that is not taken.
        """
        given = dict(config) if isinstance(config, Mapping) else config.to_dict()
        kind = plain(given.get("peft_type"))
        if kind not in cls.peft_kinds:
            known = " or ".join(repr(one) for one in cls.peft_kinds)
            raise ValueError(
                f"config: got {type(config).__name__} of peft_type {kind!r}, takes {known} for "
                f"{cls.model_class}"
            )
        common = ("num_virtual_tokens", "task_type", "modules_to_save", "inference_mode")
        named = {*common, *cls.peft_kinds[kind]}
        for name, value in given.items():
            if name not in named | _ASIDE and value not in (None, False, [], {}):
                raise ValueError(f"config.{name}: got {value!r}, which {cls.model_class} lacks")
        if given.get("num_virtual_tokens") is None:
            raise ValueError("config.num_virtual_tokens: got None, takes 1 or more")
        taken = {
            name: plain(value)
            for name, value in given.items()
            if name in named and (value is not None or name == "task_type")
        }
        taken.setdefault("task_type", None)
        taken["modules_to_save"] = given.get("modules_to_save")
        return cls(**cls._converted(kind, taken))

    @classmethod
    def _converted(cls, kind: str, taken: dict[str, Any]) -> dict[str, Any]:
        """Our fields for what is taken of PEFT's."""
        raise NotImplementedError

    @classmethod
    def _beside(cls, about: dict[str, Any]) -> dict[str, Any]:
        """What an adapter's weights tell beside its configuration, by our names."""
        return {}

    def _peft_fields(self) -> dict[str, Any]:
        """What PEFT reads."""
        told: Any = self
        common = ("peft_type", "num_virtual_tokens", "task_type", "modules_to_save")
        return {name: getattr(told, name) for name in (*common, "inference_mode")}

    def _is_told_by(self, told: dict[str, Any]) -> bool:
        """Whether fields of PEFT's are all that there is to this configuration."""
        try:
            return type(self).from_peft(told) == self
        except ValueError:
            return False


def plain(value: Any) -> Any:
    """An enum's value; others as they are."""
    return getattr(value, "value", value)
