"""Texts in folders: reading, splitting without leaks, encoding."""

from __future__ import annotations

import pytest

from fastprefix.tasks import ClassificationDataset, Example, load_folders, split_examples


@pytest.fixture
def root(tmp_path):
    """Two classes, a repeated text, a Latin-1 file, and what is no text."""
    for folder, texts in {
        "b": ["second", "third"],
        "a": ["first\n", " same text", "same  text"],
    }.items():
        (tmp_path / folder).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / folder / f"{i}.txt").write_text(text)
    (tmp_path / "a" / "9.txt").write_bytes("£5".encode("latin-1"))
    (tmp_path / "a" / "notes.md").write_text("no text")
    (tmp_path / "readme.txt").write_text("no text either")
    return tmp_path


def test_folders_are_classes(root):
    examples = load_folders(root)
    assert [(e.text, e.label) for e in examples] == [
        ("first", "a"),
        ("same text", "a"),
        ("same  text", "a"),
        ("£5", "a"),
        ("second", "b"),
        ("third", "b"),
    ]


def test_folders_that_are_no_data(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_folders(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least two"):
        load_folders(tmp_path / "a")
    (root / "b" / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        load_folders(root)


def test_a_text_is_on_one_side_whatever_else_there_is(root):
    examples = [Example(f"text {i}", "ab"[i % 2]) for i in range(500)]
    train, heldout = split_examples(examples)
    assert len(train) + len(heldout) == 500
    assert 70 < len(heldout) < 130
    again, others = split_examples([*examples[::-1], *examples, Example("text   7 ", "b")])
    assert set(again) == set(train)
    assert {e.text for e in others} == {e.text for e in heldout}
    assert len({" ".join(e.text.split()) for e in [*again, *others]}) == len(again) + len(others)


def test_splits_that_cannot_be(root):
    with pytest.raises(ValueError, match="heldout_share: got 1"):
        split_examples(load_folders(root), 1.0)
    with pytest.raises(ValueError, match="'x' and in 'y'"):
        split_examples([Example("t", "x"), Example(" t ", "y")])
    with pytest.raises(ValueError, match="leaves"):
        split_examples([Example("t", "x")])


class _Words:
    """A tokenizer of words."""

    def __call__(self, text, truncation, max_length):
        assert truncation
        ids = [len(word) for word in text.split()][:max_length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}


def test_items_are_cut_and_numbered():
    data = ClassificationDataset(
        [Example("a bb ccc dddd", "x"), Example("ee", "y")], _Words(), 3, ["y", "x"]
    )
    assert len(data) == 2
    assert data[0] == {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": 1}
    assert data[1]["labels"] == 0
    with pytest.raises(ValueError, match="'z'"):
        ClassificationDataset([Example("a", "z")], _Words(), 3, ["x", "y"])
