"""Records, tables and pictures of pretended figures."""

import json

import pytest
import torch

from fastprefix.bench import tables
from fastprefix.bench.case import OURS
from fastprefix.bench.plots import draw, families
from fastprefix.bench.records import about, append, newest, source

FACTS = {
    "machine": "A Processor, 2 cores", "threads": 2, "versions": {"torch": "2.13.0", "peft": None},
    "commit": "0123456789abcdef", "changed": False, "date": "2026-11-30T00:00:00+00:00",
}  # fmt: skip


def line(B=4, P=512, peers=(("sdpa", 4.0), ("flex", 9.0)), machine=None, **other):
    """A record; fastprefix takes 2 ms."""
    every = ((OURS, 2.0), ("fastprefix, checkpointed", 3.0), ("no prefix", 1.0), *peers)
    providers = {
        name: {"figures": {"ms": {"median": ms, "p20": ms, "p80": ms, "samples": 5}},
               "peak_bytes": int(B * 1e6)}
        for name, ms in every
    }  # fmt: skip
    found = {
        "suite": "train", "case": f"B{B} P{P}", "fields": {"B": B, "P": P, "L": 128},
        "figures": {"ms": "ms a step"}, "bound": "no prefix", "tokens": {"ms": 8},
        "providers": providers, "left_out": {},
        "about": FACTS | ({"machine": machine} if machine else {}),
    }  # fmt: skip
    return found | other


def test_records_are_added_and_the_newest_is_read(tmp_path):
    file = tmp_path / "new" / "bench.jsonl"
    first, again = line(), line(peers=[("sdpa", 8.0)])
    for each in (line(P=20, machine="Another"), first, line(P=20), again):
        append(file, each)
    assert len(file.read_text().splitlines()) == 4
    assert newest(file) == [line(P=20), again]
    append(file, line(P=1, machine="Another"))
    assert [each["case"] for each in newest(file)] == ["B4 P1"]


def test_without_records_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="got no records"):
        newest(tmp_path / "bench.jsonl")


def test_facts_name_machine_versions_commit_and_date(monkeypatch, tmp_path):
    found = about(torch.device("cpu"))
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]
    assert found["date"].endswith("+00:00")
    monkeypatch.setenv("FASTPREFIX_COMMIT", "named")
    assert source(tmp_path) == {"commit": "named", "changed": None}
    json.dumps(found)


def test_the_best_peer_is_neither_ours_nor_the_bound():
    assert tables.best_peer(line(), "ms") == "sdpa"
    assert tables.ratio(line(), "ms") == 2.0
    assert tables.ratio(line(peers=()), "ms") is None


def test_a_table_says_all_that_is_needed():
    refused = {"peft": "does not fit: takes about 9.0 GB", "fa2": "not installed"}
    (table,) = tables.tables([line(B=1), line(left_out=refused)])
    assert table.columns == (
        "case", "fastprefix", "best peer", "", "ratio", "no prefix", "tokens/s", "peak MB",
        "peer's", "variants",
    )  # fmt: skip
    assert table.rows[1] == (
        "B4 P512", "2", "sdpa", "4", "2.00x", "1", "4000", "4", "4", "checkpointed 3 ms, 4 MB",
    )  # fmt: skip
    assert table.notes[0] == "peft: does not fit: takes about 9.0 GB (B4 P512)"
    assert "largest batch of P512 text 128 in 4 GB" in table.notes[1]
    assert "fastprefix 4000" in table.notes[1]
    assert len(table.notes) == 2
    said = tables.markdown([line()])
    assert "A Processor, 2 cores, 2 threads, torch 2.13.0, commit 0123456, 2026-11-30" in said
    assert "| B4 P512 | 2 | sdpa | 4 | 2.00x |" in said


def test_a_page_keeps_all_but_what_stands_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.write_into(page, "new\n")
    assert page.read_text() == f"before\n{tables.BEGIN}\nnew\n{tables.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="lacks"):
        tables.write_into(page, "new\n")


def test_pictures_are_drawn_of_the_largest_family(tmp_path):
    grid = [line(B, P) for B in (1, 4) for P in (0, 512)]
    other = line(64, 20, fields={"B": 64, "P": 20, "L": 7})
    assert families([*grid, other]) == {"train": grid}
    files = draw([*grid, other], tmp_path / "pictures")
    assert [file.name for file in files] == ["bench_train.png", "bench_train_map.png"]
    assert all(file.stat().st_size > 5000 for file in files)
    assert draw([line()], tmp_path) == []


def test_every_picture_says_what_it_was_measured_on(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda figure, *_, **__: said.append(figure._supxlabel.get_text()),
    )
    draw([line(B, P) for B in (1, 4) for P in (0, 512)], tmp_path)
    assert said == [tables.origin(line())] * 2
