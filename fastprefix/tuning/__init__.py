"""Models with trainable prefixes and prompts.

To train them, see :mod:`fastprefix.tuning.trainer` and :mod:`fastprefix.tuning.callbacks`. These
are not imported here, because transformers' Trainer takes a while to import.
"""

from fastprefix.tuning.accounting import ParameterCount, count_parameters
from fastprefix.tuning.configs import PrefixConfig, PromptConfig
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
