"""Configurations that callers give: ours or PEFT's, and whether they agree with saved files."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

from transformers import AutoTokenizer

from fastprefix.formats.source import Source
from fastprefix.tuning.configs.prefix_config import PrefixConfig
from fastprefix.tuning.configs.prompt_config import PromptConfig
from fastprefix.tuning.configs.tuning_config import PeftConfigLike, TuningConfig, enum_value

_Config = TypeVar("_Config", PrefixConfig, PromptConfig)

# Fields on how a prefix is made and trained. Its files do not hold them: the network is not saved.
_NOT_IN_FILES = {
    *("dropout", "fallback", "groups", "inference_mode", "layers", "prefix_projection"),
    *("share_layers", "encoder_dropout", "encoder_hidden_size", "encoder_num_layers"),
    *("encoder_orthogonal", "encoder_per_layer", "encoder_reparameterization_type"),
    *("init", "init_prefix", "init_resize", "init_std", "init_text"),
}
# Fields that are compared even if the caller left them at their default.
_ALWAYS_COMPARED = ("num_virtual_tokens", "peft_type")


def as_prefix_config(config: PrefixConfig | PeftConfigLike) -> PrefixConfig:
    """Returns a PrefixConfig as it is; converts PEFT's PrefixTuningConfig and CartridgeConfig.

    Raises:
        TypeError: config is no configuration of a prefix.
        ValueError: PEFT's configures another method, or has a field that we do not accept.
    """
    return _converted(PrefixConfig, config)


def as_prompt_config(config: PromptConfig | PeftConfigLike) -> PromptConfig:
    """Returns a PromptConfig as it is; converts PEFT's PromptTuningConfig and PromptEncoderConfig.

    Raises:
        TypeError: config is no configuration of a prompt.
        ValueError: PEFT's configures another method, or has a field that we do not accept.
    """
    return _converted(PromptConfig, config)


def tokenizer_of(config: Any) -> Any:
    """The tokenizer that PEFT's PromptTuningConfig names for its text; None if it needs none."""
    if enum_value(getattr(config, "prompt_tuning_init", None)) != "TEXT":
        return None
    options = config.tokenizer_kwargs or {}
    return AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)


def agreed(wanted: _Config, found: _Config, place: Source) -> _Config:
    """The configuration of saved files, checked against the one that the caller expects.

    A field that the caller left at its default is not compared, except length and method.

    Args:
        wanted: the caller's.
        found: that of the files.
        place: where the files are, for messages.

    Returns:
        `found`, with the task and the dropout of `wanted` where files do not hold them.

    Raises:
        ValueError: they differ.
    """
    for field in fields(found):
        name = field.name
        given, saved = getattr(wanted, name), getattr(found, name)
        if name in _NOT_IN_FILES or (given == field.default and name not in _ALWAYS_COMPARED):
            continue
        if name == "modules_to_save":
            given, saved = set(given), set(saved or ())
        if given != saved and not (name == "task_type" and saved is None):
            raise ValueError(f"config.{name}: got {given!r}, takes {saved!r} as in {place}")
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
