"""What models take as a configuration: ours, or PEFT's; and whether it agrees with a file."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

from transformers import AutoTokenizer

from fastprefix.hf.hub import Source
from fastprefix.tuning.configs.prefix_config import PrefixConfig
from fastprefix.tuning.configs.prompt_config import PromptConfig
from fastprefix.tuning.configs.tuning_config import PeftConfigLike, TuningConfig, enum_value

_Config = TypeVar("_Config", PrefixConfig, PromptConfig)

# How a prefix is made and trained, which its files do not tell: the network is dropped.
_UNTOLD = {
    *("dropout", "fallback", "groups", "inference_mode", "layers", "prefix_projection"),
    *("share_layers", "encoder_dropout", "encoder_hidden_size", "encoder_num_layers"),
    *("encoder_orthogonal", "encoder_per_layer", "encoder_reparameterization_type"),
    *("init", "init_prefix", "init_resize", "init_std", "init_text"),
}
_ALWAYS = ("num_virtual_tokens", "peft_type")


def as_prefix_config(config: PrefixConfig | PeftConfigLike) -> PrefixConfig:
    """A PrefixConfig, also for PEFT's PrefixTuningConfig and CartridgeConfig.

    Raises:
        TypeError: no configuration.
        ValueError: of another method, or with a field that is not taken.
    """
    return _converted(PrefixConfig, config)


def as_prompt_config(config: PromptConfig | PeftConfigLike) -> PromptConfig:
    """A PromptConfig, also for PEFT's PromptTuningConfig and PromptEncoderConfig.

    Raises:
        TypeError: no configuration.
        ValueError: of another method, or with a field that is not taken.
    """
    return _converted(PromptConfig, config)


def tokenizer_of(config: Any) -> Any:
    """The tokenizer that PEFT's PromptTuningConfig names for its text; None if it needs none."""
    if enum_value(getattr(config, "prompt_tuning_init", None)) != "TEXT":
        return None
    options = config.tokenizer_kwargs or {}
    return AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)


def agreed(wanted: _Config, found: _Config, place: Source) -> _Config:
    """The configuration of files, if it is what a caller says that they hold.

    A field that is left at its default asks for nothing, but for the length and the method.

    Args:
        wanted: the caller's.
        found: as the files tell it.
        place: the files, for messages.

    Raises:
        ValueError: they differ.
    """
    for field in fields(found):
        name = field.name
        asked, told = getattr(wanted, name), getattr(found, name)
        if name in _UNTOLD or (asked == field.default and name not in _ALWAYS):
            continue
        if name == "modules_to_save":
            asked, told = set(asked), set(told or ())
        if asked != told and not (name == "task_type" and told is None):
            raise ValueError(f"config.{name}: got {asked!r}, takes {told!r} as in {place}")
    if found.task_type is None:
        found = replace(found, task_type=wanted.task_type)
    if isinstance(found, PrefixConfig) and isinstance(wanted, PrefixConfig):
        return replace(found, dropout=wanted.dropout)
    return found


def _converted(kind: type[_Config], config: Any) -> _Config:
    if isinstance(config, kind):
        return config
    if isinstance(config, TuningConfig) or not hasattr(config, "to_dict"):
        raise TypeError(
            f"config: got {type(config).__name__}, takes a {kind.__name__} or PEFT's for "
            f"{kind.model_class}"
        )
    return kind.from_peft(config)
