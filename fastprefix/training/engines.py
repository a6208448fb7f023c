"""Where the runs of a comparison are worked off: processes of this machine, or a Ray cluster.

Each run gets a process of its own. Its peak memory is then its own, and one that crashes takes no
other along. What a run prints is in ``log.txt`` of its folder.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
import uuid
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from fastprefix.arguments import check_whole
from fastprefix.training.config import RunConfig
from fastprefix.training.messages import reason

LOG = "log.txt"
Train = Callable[[RunConfig, Path], object]
_SECONDS_TO_END = 10.0


@dataclass(frozen=True)
class Job:
    """A run to do, and the folder that it writes; an absolute path."""

    config: RunConfig
    folder: Path


@dataclass(frozen=True)
class Event:
    """What became of a job.

    Attributes:
        index: its place among the jobs.
        state: "started" is told only where it is known.
        error: why it failed.
    """

    index: int
    state: Literal["started", "finished", "failed"]
    error: str | None = None


class Engine(Protocol):
    """Works off jobs."""

    def run(self, jobs: Sequence[Job], train: Train) -> Generator[Event, None, None]:
        """Does all jobs, those that fail included, and tells of each when it ends.

        Closing the iterator ends all jobs that still run.

        Args:
            jobs: what to do.
            train: does one, in a worker; a function that the worker can import.
        """
        ...


@dataclass(frozen=True)
class LocalEngine:
    """Processes on this machine.

    Attributes:
        jobs: how many run at a time.
        threads: of PyTorch, in each.
    """

    jobs: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        check_whole("jobs", self.jobs, 1)
        check_whole("threads", self.threads, 1)

    def run(self, jobs: Sequence[Job], train: Train) -> Generator[Event, None, None]:
        """See :meth:`Engine.run`."""
        context = multiprocessing.get_context("spawn")
        waiting = list(enumerate(jobs))
        running: dict[Connection, tuple[int, BaseProcess]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    index, job = waiting.pop(0)
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(
                        target=_child, args=(sender, job, train, self.threads)
                    )
                    process.start()
                    sender.close()  # so that the receiver sees when the child has closed its own
                    running[receiver] = (index, process)
                    yield Event(index, "started")
                ended: Any = wait(list(running))
                for receiver in ended:
                    yield _ended(receiver, *running.pop(receiver))
        finally:
            _end([process for _, process in running.values()])


def _ended(receiver: Connection, index: int, process: BaseProcess) -> Event:
    try:
        error = receiver.recv()
        process.join()
    except EOFError:  # it ended without a word
        process.join()
        error = f"the process ended {_how(process.exitcode)}"
    receiver.close()
    return Event(index, "finished" if error is None else "failed", error)


def _how(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    maybe = "; memory may have run out" if name == "SIGKILL" else ""
    return f"by the signal {name}{maybe}"


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(_SECONDS_TO_END)
        if process.is_alive():
            process.kill()
            process.join()


def _child(sender: Connection, job: Job, train: Train, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender.send(_done(job, train, threads))


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise train on, for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _done(job: Job, train: Train, threads: int) -> str | None:
    """Does a job in a process that does no other; returns why it failed, None if it did not."""
    torch.set_num_threads(threads)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / LOG).open("ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        train(job.config, job.folder)
    except Exception as error:  # whatever it is, the other jobs go on and the report tells it
        traceback.print_exc()
        return reason(error)
    return None


@dataclass(frozen=True)
class RayEngine:
    """A Ray cluster: one that runs already, or one that is started on this machine.

    All its nodes must see the folder of the comparison under the same path, because a run that
    was stopped goes on from there. This is checked before the first run. Data files and models
    must be there too, fastprefix must be installed.

    Attributes:
        address: of a running cluster, "auto" for the one of this machine. None starts one that
            ends with the comparison, unless the process has connected to one before.
        jobs: how many run at a time; None for as many as there is room for.
        threads: of PyTorch, in each; as many CPUs are reserved.
        gpus: that each reserves; a part of one, such as 0.5, is possible.
    """

    address: str | None = None
    jobs: int | None = None
    threads: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        check_whole("jobs", self.jobs, 1, none=True)
        check_whole("threads", self.threads, 1)
        _ray()

    def run(self, jobs: Sequence[Job], train: Train) -> Generator[Event, None, None]:
        """See :meth:`Engine.run`.

        Raises:
            ConnectionError: there is no cluster at that address.
            ValueError: a node does not see the folder.
        """
        ray = _ray()
        connected = ray.is_initialized()
        if not connected:
            self._connect(ray)
        try:
            for folder in {job.folder.parent for job in jobs}:
                _check_shared(ray, folder)
            yield from self._events(ray, jobs, train)
        finally:
            if not connected:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # tell nobody of it
            cpus = None if self.jobs is None else self.jobs * self.threads
            options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        else:
            options["address"] = self.address
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            told = reason(error).splitlines()[0]
            raise ConnectionError(f"ray: cannot connect to {self.address}: {told}") from error

    def _events(self, ray: Any, jobs: Sequence[Job], train: Train) -> Generator[Event, None, None]:
        # Workers are used once, so that each run has a process of its own here too.
        remote = ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_calls=1, max_retries=0)(
            _remote
        )
        waiting = list(enumerate(jobs))
        running: dict[Any, int] = {}
        try:
            while waiting or running:
                while waiting and (self.jobs is None or len(running) < self.jobs):
                    index, job = waiting.pop(0)
                    running[remote.remote(job, train, self.threads, os.getcwd())] = index
                for reference in ray.wait(list(running))[0]:
                    index = running.pop(reference)
                    try:
                        error = ray.get(reference)
                    except ray.exceptions.RayError as failure:  # the worker or its node is gone
                        error = reason(failure).splitlines()[0]
                    yield Event(index, "finished" if error is None else "failed", error)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _remote(job: Job, train: Train, threads: int, folder: str) -> str | None:
    with contextlib.suppress(FileNotFoundError):  # relative names of files are the driver's
        os.chdir(folder)
    return _done(job, train, threads)


def _check_shared(ray: Any, folder: Path) -> None:
    """Whether all nodes see what this process writes.

    Raises:
        ValueError: one does not.
    """
    pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    token = folder / f".shared-{uuid.uuid4().hex}"
    token.touch()
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        seen = [
            ray.remote(num_cpus=0, scheduling_strategy=pinned(node["NodeID"], soft=False))(_sees)
            .remote(str(token))
            for node in nodes
        ]  # fmt: skip
        blind = [
            node["NodeManagerHostname"]
            for node, sees in zip(nodes, ray.get(seen), strict=True)
            if not sees
        ]
    finally:
        token.unlink()
    if blind:
        raise ValueError(
            f"folder: {folder} is not seen by {', '.join(blind)}, takes one that all nodes of the "
            "Ray cluster share"
        )


def _sees(file: str) -> bool:
    return Path(file).is_file()


def _ray() -> Any:
    """Ray.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ImportError("the engine ray needs the package ray (pip install ray)") from error
    return ray
