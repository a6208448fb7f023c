"""Steps of greedy generation with a whole model. See :mod:`fastprefix.bench.generate_suite`."""

from collections.abc import Callable


def test_generate(replay: Callable[[], None]) -> None:
    """A case and a provider."""
    replay()
