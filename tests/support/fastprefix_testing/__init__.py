"""What the tests share: tiny models, problems for the operator, oracles, and one rule of accuracy.

A plain package. pytest finds it by ``pythonpath`` in ``pyproject.toml``; a process that a test
starts needs ``tests/support`` on its ``PYTHONPATH``.
"""
