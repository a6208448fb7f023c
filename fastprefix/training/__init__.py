"""Training runs from one configuration each, and comparisons of many.

Nothing is imported here: :mod:`fastprefix.training.sources` and
:mod:`fastprefix.training.settings` work without PyTorch.
"""
