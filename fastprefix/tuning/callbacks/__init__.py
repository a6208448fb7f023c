"""Training aids, as callbacks of ``transformers.Trainer``."""

from fastprefix.tuning.callbacks.growth import ProgressiveLength
from fastprefix.tuning.callbacks.guard import StopOnCollapse
from fastprefix.tuning.callbacks.layers import ProgressiveLayers
from fastprefix.tuning.callbacks.monitor import PrefixMonitor

__all__ = ["PrefixMonitor", "ProgressiveLayers", "ProgressiveLength", "StopOnCollapse"]
