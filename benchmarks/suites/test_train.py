"""Training steps of a whole model. See :mod:`fastprefix.bench.train_suite`."""

from collections.abc import Callable


def test_train(replay: Callable[[], None]) -> None:
    """A case and a provider."""
    replay()
