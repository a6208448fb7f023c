"""The benchmark suites: what is measured, by whom, and how the figures are kept.

:mod:`fastprefix.bench.suites` lists the cases of every suite. ``fastprefix bench`` runs them, and
``pytest benchmarks/suites`` runs the same ones under pytest-benchmark.
"""
