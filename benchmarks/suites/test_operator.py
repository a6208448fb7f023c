"""One call of attention: prefill, decode, backward. See :mod:`fastprefix.bench.operator_suite`."""

from collections.abc import Callable


def test_operator(replay: Callable[[], None]) -> None:
    """A case and a provider."""
    replay()
