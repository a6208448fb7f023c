"""Configurations of what is trained: their fields and checks, and PEFT's files and objects."""

from fastprefix.tuning.configs.prefix_config import PrefixConfig
from fastprefix.tuning.configs.prompt_config import PromptConfig

__all__ = ["PrefixConfig", "PromptConfig"]
