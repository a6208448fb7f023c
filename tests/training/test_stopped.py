"""Comparisons that are stopped, and go on. The runs are pretended, the processes are not."""

import os
import re
import signal

import yaml

from fastprefix_testing.comparisons import begun, eventually, gone, start
from fastprefix_testing.pretended_runs import train


def write_config(tmp_path, methods):
    config = {"base": {"task": "e2e_nlg", "max_steps": 8}, "methods": methods, "seeds": [0]}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return tmp_path / "compare.yaml"


def finished(tmp_path):
    """The results by the name of their folder, and what would change if they were written again."""
    files = sorted(tmp_path.glob("runs/*/result.json"))
    return {file.parent.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def test_a_killed_comparison_goes_on_where_it_was(tmp_path):
    comes_later = tmp_path / "later"
    waits = {"method": "lora", "options": {"wait_for": str(comes_later)}}
    file = write_config(tmp_path, {"prefix": {}, "full": {"method": "full"}, "LoRA": waits})
    first = start(file, tmp_path, 2, train)
    try:
        assert eventually(lambda: len(finished(tmp_path)) >= 2 and len(begun(tmp_path)) >= 3)
        before = finished(tmp_path)
        workers = begun(tmp_path)
    finally:
        first.kill()
        _, told = first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL, told
    assert eventually(lambda: all(map(gone, workers))), "workers outlive the comparison"
    assert finished(tmp_path) == before
    assert not (tmp_path / "report.html").exists()

    comes_later.touch()
    second = start(file, tmp_path, 2, train)
    _, told = second.communicate(timeout=240)
    assert second.returncode == 0, told
    after = finished(tmp_path)
    assert len(after) == 3
    assert {name: after[name] for name in before} == before
    report = (tmp_path / "report.html").read_text()
    assert "3 of 3 runs finished" in report
    assert len(re.findall('<img src="data:image/svg', report)) == 3
    assert all(name in report for name in after)


def test_workers_end_on_ctrl_c(tmp_path):
    """All processes of a terminal get the signal; only the parent may act on it."""
    never = {"options": {"wait_for": str(tmp_path / "never")}}
    methods = {"a": never, "b": never | {"method": "lora"}}
    parent = start(write_config(tmp_path, methods), tmp_path, 2, train)
    try:
        workers = eventually(lambda: len(begun(tmp_path)) == 2 and begun(tmp_path))
        assert workers, "the comparison did not begin"
        os.killpg(parent.pid, signal.SIGINT)
        _, told = parent.communicate(timeout=60)
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)
    assert all(map(gone, workers))
    assert told.count("KeyboardInterrupt") == 1  # the workers said nothing
