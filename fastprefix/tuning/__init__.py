"""Models with trainable prefixes and prompts."""

from fastprefix.tuning.config import PrefixConfig
from fastprefix.tuning.model import PrefixTuningModel
from fastprefix.tuning.prompt import PromptTuningModel
from fastprefix.tuning.prompt_config import PromptConfig

__all__ = ["PrefixConfig", "PrefixTuningModel", "PromptConfig", "PromptTuningModel"]
