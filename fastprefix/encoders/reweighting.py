"""The former place and name of HeadParameters, which pickled encoders of older versions look up."""

from fastprefix.encoders.head_parameters import HeadParameters as HeadNumbers

__all__ = ["HeadNumbers"]
