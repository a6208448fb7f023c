"""A data set that is read and tokenised while training goes on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from os import PathLike
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from fastprefix.arguments import check_whole, methods_refuse_unknown_arguments
from fastprefix.tasks.encoding import Encoding
from fastprefix.tasks.loading import stream_examples
from fastprefix.tasks.task import Example, Split


@methods_refuse_unknown_arguments
class StreamedItems(IterableDataset[dict[str, Any]]):
    """The items of a split, for a Trainer with ``max_steps``; only a buffer of them is in memory.

    Each pass over them has another order. Several workers of a ``DataLoader`` share the examples.

    Args:
        encoding: of the task whose examples are read.
        split: "train", "validation" or "test".
        data_files: as :func:`fastprefix.tasks.loading.load_examples` takes them.
        columns: as that function takes them.
        buffer_size: examples among which the next one is drawn; 1 keeps the order of the data.
        seed: of the order.

    Raises:
        ValueError: when read, what ``load_examples`` raises.
    """

    def __init__(
        self,
        encoding: Encoding,
        split: Split = "train",
        *,
        data_files: Mapping[str, str | PathLike[str]] | None = None,
        columns: Mapping[str, str] | None = None,
        buffer_size: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_whole("buffer_size", buffer_size, 1)
        self._encoding = encoding
        self._split = split
        self._data_files = data_files
        self._columns = columns
        self._buffer_size = buffer_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order; a Trainer calls it before each pass."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the items."""
        task = self._encoding.task
        examples = stream_examples(
            task, self._split, data_files=self._data_files, columns=self._columns
        )
        first = next(examples, None)
        if first is None:
            raise ValueError(f"split: {self._split} of {task.name} has no examples")
        examples = chain([first], examples)
        worker = get_worker_info()
        if worker is not None:
            examples = islice(examples, worker.id, None, worker.num_workers)
        order = random.Random(f"{self._seed} {self._epoch}")
        yield from self._encoding.items(_shuffled(examples, self._buffer_size, order))


def _shuffled(
    examples: Iterable[Example], buffer_size: int, order: random.Random
) -> Iterator[Example]:
    """All examples, each drawn from a buffer that the following ones refill."""
    rest = iter(examples)
    buffer = list(islice(rest, buffer_size))
    for example in rest:
        i = order.randrange(len(buffer))
        yield buffer[i]
        buffer[i] = example
    order.shuffle(buffer)
    yield from buffer
