"""Worker processes: what they do with failures, and when they end. The runs are pretended."""

import multiprocessing
import os
from contextlib import closing

import pytest

from fastprefix.training.config import RunConfig
from fastprefix.training.engines import Job, LocalEngine
from fastprefix_testing.comparisons import begun, eventually, gone
from fastprefix_testing.pretended_runs import train


def job(folder, **options):
    return Job(RunConfig.of({"task": "e2e_nlg", "max_steps": 8, "options": options}), folder)


def test_failures_of_every_kind_leave_the_others_alone(tmp_path):
    kinds = {"good": {}, "raise": {"pretend": "raise"}, "die": {"pretend": "die"},
             "exit": {"pretend": "exit"}}  # fmt: skip
    jobs = [job(tmp_path / name, **options) for name, options in kinds.items()]
    with closing(LocalEngine(2).run(jobs, train)) as running:
        events = list(running)
    assert sorted(event.index for event in events if event.state == "started") == [0, 1, 2, 3]
    errors = {event.index: event.error for event in events if event.state != "started"}
    assert errors == {
        0: None,
        1: "options: got pretend, takes <less> | *more*",
        2: "the process ended by the signal SIGKILL; memory may have run out",
        3: "the process ended with exit code 3",
    }
    assert (tmp_path / "good" / "result.json").exists()
    assert "a line of prefix" in (tmp_path / "good" / "log.txt").read_text()
    log = (tmp_path / "raise" / "log.txt").read_text()
    assert "Traceback" in log
    assert "ValueError: options: got pretend" in log
    assert len(set(begun(tmp_path))) == 4
    assert os.getpid() not in begun(tmp_path)


def test_closing_ends_what_still_runs(tmp_path):
    never = str(tmp_path / "never")
    jobs = [job(tmp_path / "waits", wait_for=never), job(tmp_path / "waits too", wait_for=never)]
    events = LocalEngine(1).run(jobs, train)
    assert next(events).state == "started"
    (worker,) = eventually(lambda: begun(tmp_path))
    assert not gone(worker)
    events.close()
    assert gone(worker)
    assert multiprocessing.active_children() == []
    assert not (tmp_path / "waits too").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"jobs": 0}, "jobs: got 0, takes 1 or more"), ({"threads": 0}, "threads: got 0, takes 1")],
)
def test_numbers_that_an_engine_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        LocalEngine(**options)
