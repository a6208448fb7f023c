"""The prefixes of many tasks on one model. See :mod:`fastprefix.bench.serve_suite`."""

from collections.abc import Callable


def test_serve(replay: Callable[[], None]) -> None:
    """A case and a provider."""
    replay()
