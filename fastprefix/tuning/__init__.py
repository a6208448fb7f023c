"""Models with trainable prefixes.

Their training is in :mod:`fastprefix.tuning.trainer` and :mod:`fastprefix.tuning.callbacks`, which
take transformers' Trainer a while to import.
"""

from fastprefix.tuning.accounting import ParameterCount, count_parameters
from fastprefix.tuning.config import PrefixConfig
from fastprefix.tuning.model import PrefixTuningModel

__all__ = ["ParameterCount", "PrefixConfig", "PrefixTuningModel", "count_parameters"]
