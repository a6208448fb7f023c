"""What all configurations share: fields and checks, dictionaries, files, PEFT's own objects."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fastprefix.arguments import (
    check_names,
    check_type,
    check_whole,
    methods_refuse_unknown_arguments,
)
from fastprefix.files import json_text, written_whole
from fastprefix.formats.peft_files import CONFIG_FILE, read_about, read_config
from fastprefix.formats.source import Source

if TYPE_CHECKING:
    from typing_extensions import Self

# PEFT's names of the tasks; None leaves the task open, as in PEFT.
_TASK_TYPES = (
    "CAUSAL_LM",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
    None,
)
# The entry of a file that holds all our fields, where PEFT's fields cannot express them.
_OWN_ENTRY = "fastprefix"
# Fields that do not change how a prefix is trained: they say where it comes from, or repeat what
# the model knows. Some of them only our files have.
_IGNORED = {
    *("auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision"),
    *("num_attention_heads", "num_layers", "num_transformer_submodules", "token_dim"),
    *("not_peft", "kind", "tokenizer_kwargs", "tokenizer_name_or_path", _OWN_ENTRY),
}


class PeftConfigLike(Protocol):
    """What we need of PEFT's configuration objects; PEFT itself may not be installed."""

    peft_type: Any

    def to_dict(self) -> dict[str, Any]:
        """All fields."""


@methods_refuse_unknown_arguments
@dataclass
class TuningConfig:
    """The base of our configurations: shared fields and checks, and the methods that PEFT's have.

    Subclasses also have the fields encoder_hidden_size, encoder_num_layers, init, init_text,
    modules_to_save, inference_mode and peft_type. They are declared there, so that each class keeps
    the order of its positional arguments.

    Attributes:
        num_virtual_tokens: length P of the prefix or prompt.
        task_type: PEFT's name of the task; None leaves it open.
        peft_kinds: the peft_types that this class can express, each with the names of the fields
            that are read of it in addition to those that all types have.
        model_class: the name of the class of models that it configures, for messages.
    """

    num_virtual_tokens: int = 20
    task_type: str | None = "CAUSAL_LM"

    peft_kinds: ClassVar[Mapping[str, Collection[str]]]
    model_class: ClassVar[str]

    @property
    def is_prompt_learning(self) -> bool:
        """True, as in PEFT's configurations of prefixes and prompts."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """All fields, and ``peft_type``."""
        config: Any = self
        return {"peft_type": config.peft_type, **asdict(self)}

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes adapter_config.json, for our :meth:`from_pretrained` and for PEFT's.

        If PEFT's fields cannot express the configuration, the file has an additional entry with all
        our fields. PEFT warns that it does not know this entry, and ignores it.

        Args:
            save_directory: created if it does not exist.

        Raises:
            OSError: the file cannot be written.
            ValueError: save_directory is a file.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory: got the file {folder}, takes a folder")
        fields = self._peft_fields()
        if not self._is_expressed_by(fields):
            fields[_OWN_ENTRY] = asdict(self)
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / CONFIG_FILE) as partial:
            partial.write_text(json_text(fields), encoding="utf-8")

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
            subfolder: the sub-folder that holds the file.
            revision: a branch, tag or commit of the repository.
            token: the hub's access token.
            cache_dir: where downloads go.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the file has another peft_type, or a field that this class does not accept.
        """
        name = str(pretrained_model_name_or_path)
        place = Source(name, subfolder, revision, token, cache_dir)
        fields, file = read_config(place, cls.peft_kinds)
        try:
            if isinstance(fields.get(_OWN_ENTRY), dict):
                return cls(**fields[_OWN_ENTRY])
            return cls.from_peft({**fields, **cls._fields_of_weights(read_about(place))})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_peft(cls, config: Any) -> Self:
        """Converts PEFT's configuration, given as an object or as the fields of its file.

        A start from a text, from the vocabulary or from zeros is kept. A random start is ours: its
        standard deviation is our default, where PEFT's is 1.

        Raises:
            ValueError: it configures another method, or has a field or value that this class does
                not accept.
        """
        given = dict(config) if isinstance(config, Mapping) else config.to_dict()
        kind = enum_value(given.get("peft_type"))
        if kind not in cls.peft_kinds:
            known = " or ".join(repr(one) for one in cls.peft_kinds)
            raise ValueError(
                f"config: got {type(config).__name__} of peft_type {kind!r}, takes {known} for "
                f"{cls.model_class}"
            )
        common = ("num_virtual_tokens", "task_type", "modules_to_save", "inference_mode")
        accepted = {*common, *cls.peft_kinds[kind]}
        for name, value in given.items():
            if name not in accepted | _IGNORED and value not in (None, False, [], {}):
                raise ValueError(f"config.{name}: got {value!r}, which {cls.model_class} lacks")
        if given.get("num_virtual_tokens") is None:
            raise ValueError("config.num_virtual_tokens: got None, takes 1 or more")
        fields = {
            name: enum_value(value)
            for name, value in given.items()
            if name in accepted and (value is not None or name == "task_type")
        }
        fields.setdefault("task_type", None)
        fields["modules_to_save"] = given.get("modules_to_save")
        return cls(**cls._from_peft_fields(kind, fields))

    @classmethod
    def _from_peft_fields(cls, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Our fields for PEFT's fields of this peft_type."""
        raise NotImplementedError

    @classmethod
    def _fields_of_weights(cls, about: dict[str, Any]) -> dict[str, Any]:
        """Our fields that an adapter's weights file tells, and its configuration does not."""
        return {}

    def _peft_fields(self) -> dict[str, Any]:
        """The fields that PEFT reads, by PEFT's names."""
        common = ("peft_type", "num_virtual_tokens", "task_type", "modules_to_save")
        return {name: getattr(self, name) for name in (*common, "inference_mode")}

    def _is_expressed_by(self, peft_fields: dict[str, Any]) -> bool:
        """Whether reading these fields of PEFT's gives this configuration again."""
        try:
            return type(self).from_peft(peft_fields) == self
        except ValueError:
            return False

    def _check_shared_fields(self) -> None:
        """Checks the fields that all subclasses have and check alike.

        Raises:
            TypeError: a field has the wrong type.
            ValueError: a number is too small, or the task is unknown.
        """
        self.task_type = enum_value(self.task_type)
        given: Any = self
        check_whole("num_virtual_tokens", self.num_virtual_tokens, 1)
        check_whole("encoder_hidden_size", given.encoder_hidden_size, 1, none=True)
        check_whole("encoder_num_layers", given.encoder_num_layers, 1)
        if given.init_text is not None:
            check_type("init_text", given.init_text, str, "a text, or None")
        if given.modules_to_save is not None:
            check_names("modules_to_save", given.modules_to_save, "a list of names, or None")
        self._check_choice("task_type", _TASK_TYPES)

    def _check_choice(self, name: str, choices: tuple[Any, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, takes one of {choices}")


def enum_value(value: Any) -> Any:
    """The value of a member of an enum, as PEFT uses for types; anything else unchanged."""
    return getattr(value, "value", value)
