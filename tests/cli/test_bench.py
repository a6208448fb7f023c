"""``fastprefix bench``: measures, adds, draws; and what it refuses."""

import json
from contextlib import nullcontext

from typer.testing import CliRunner

from fastprefix.bench.measure import WrongResultError
from fastprefix.bench.tables import BEGIN, END
from fastprefix.cli.app import app


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_records_are_added_and_drawn(tmp_path, monkeypatch):
    once = ["operator", "--tiny", "--case", "prefill", "--rounds", 2, "--output", tmp_path]
    for count in (1, 2):
        result = run(*once)
        assert result.exit_code == 0, result.output
        lines = (tmp_path / "bench_tiny.jsonl").read_text().splitlines()
        assert len(lines) == count
        # once is enough for a child process, which takes seconds to start
        monkeypatch.setattr("fastprefix.cli.bench.MemoryMeter", lambda device: nullcontext())
    assert "1 cases, about 0 minutes" in result.stderr
    record = json.loads(lines[0])
    assert record["suite"] == "operator"
    assert record["about"]["commit"]
    assert record["left_out"]["fastprefix triton"]
    ours = record["providers"]["fastprefix"]
    assert ours["figures"]["ms"]["samples"] == 2
    assert ours["peak_bytes"] >= 0
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    drawn = run("--plot", "--tiny", "--output", tmp_path, "--page", page)
    assert drawn.exit_code == 0, drawn.output
    assert "prefill B2 Hq4 Hkv2" in page.read_text()
    assert (tmp_path / "bench.md").read_text() in page.read_text()


def test_a_wrong_provider_is_an_error_and_no_record(tmp_path, monkeypatch):
    def wrong(*_, **__):
        raise WrongResultError("operator, a case: sdpa is wrong")

    monkeypatch.setattr("fastprefix.cli.bench.measure", wrong)
    result = run("operator", "--tiny", "--output", tmp_path)
    assert result.exit_code == 1
    assert "error: operator, a case: sdpa is wrong" in result.stderr
    assert not (tmp_path / "bench_tiny.jsonl").exists()


def test_mistakes_are_one_clear_line(tmp_path):
    for arguments, code, said in (
        (
            ["serving"],
            1,
            "suites: got 'serving', takes operator, generate, train, serve; did",
        ),
        (["serve", "--case", "P7"], 1, "case: got 'P7', which is in no label of serve"),
        (["--page", tmp_path], 1, "--page: got "),
        (["--plot", "--output", tmp_path], 1, "bench.jsonl: got no records"),
    ):
        result = run(*arguments)
        assert result.exit_code == code
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == 1, result.stderr
