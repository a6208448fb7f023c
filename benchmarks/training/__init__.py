"""The ways to tune a model compared: one budget, one data set, every method.

Imports in here are relative, because mypy knows this package as ``benchmarks.training``.
"""
