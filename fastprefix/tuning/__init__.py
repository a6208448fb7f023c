"""Models with trainable prefixes."""

from fastprefix.tuning.config import PrefixConfig
from fastprefix.tuning.model import PrefixTuningModel

__all__ = ["PrefixConfig", "PrefixTuningModel"]
