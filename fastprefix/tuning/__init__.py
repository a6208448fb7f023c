"""Models with trainable prefixes and prompts.

Their training is in :mod:`fastprefix.tuning.trainer` and :mod:`fastprefix.tuning.callbacks`, which
take transformers' Trainer a while to import.
"""

from fastprefix.tuning.accounting import ParameterCount, count_parameters
from fastprefix.tuning.configs.prefix_config import PrefixConfig
from fastprefix.tuning.configs.prompt_config import PromptConfig
from fastprefix.tuning.prefix_model import PrefixTuningModel
from fastprefix.tuning.prompt_model import PromptTuningModel

__all__ = [
    "ParameterCount",
    "PrefixConfig",
    "PrefixTuningModel",
    "PromptConfig",
    "PromptTuningModel",
    "count_parameters",
]
