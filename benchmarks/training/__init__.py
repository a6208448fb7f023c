"""The ways to tune a model compared: one budget, one data set, every method.

Imports in here are relative, because mypy knows this package as ``benchmarks.training``: with its
folder on the path, ``operator.py`` beside it would hide Python's own.
"""
