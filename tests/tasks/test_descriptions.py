"""Reading records: the shipped ones, and files of one's own with their mistakes."""

import json
import pickle

import pytest

from fastprefix.tasks import Record, load_descriptions, load_records

GOOD = '{"attributes": {"name": "Alder Court", "type": "inn"}, "description": "It is an inn."}'


def test_prompt_is_one_line_in_the_order_of_the_attributes():
    record = Record({"name": "Alder Court", "type": "inn", "price": "£85 a night"}, "An inn.")
    assert record.prompt == "name: Alder Court | type: inn | price: £85 a night"


def test_records_are_frozen_equal_hashable_and_can_be_pickled():
    record = Record({"name": "A"}, "An inn.")
    with pytest.raises(AttributeError):
        record.description = "Another."
    assert {record, Record({"name": "A"}, "An inn.")} == {record}
    assert record != Record({"name": "B"}, "An inn.")
    assert pickle.loads(pickle.dumps(record)) == record


def test_shipped_splits_load():
    train, heldout = load_descriptions("train"), load_descriptions("heldout")
    assert len(train) > 400
    assert len(heldout) >= 80
    assert all(list(r.attributes)[:2] == ["name", "type"] for r in train + heldout)
    with pytest.raises(ValueError, match=r"split: got 'test', takes .*'train', 'heldout'"):
        load_descriptions("test")


def test_jsonl_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    # A byte-order mark, CRLF, a blank line, and a line separator inside a string.
    text = "\ufeff" + GOOD + "\r\n\n" + GOOD.replace("an inn", "a\u2028b") + "\n"
    path.write_bytes(text.encode("utf-8"))
    first, second = load_records(str(path))
    assert first == Record({"name": "Alder Court", "type": "inn"}, "It is an inn.")
    assert second.description == "It is a\u2028b."


def test_text_file(tmp_path):
    path = tmp_path / "valid.txt"
    path.write_text(
        "name : The Mill | hours : 9:00 to 5:00||The Mill opens at nine . \n\n", "utf-8"
    )
    (record,) = load_records(path)
    assert record.attributes == {"name": "The Mill", "hours": "9:00 to 5:00"}
    assert record.description == "The Mill opens at nine ."
    assert record.prompt == "name: The Mill | hours: 9:00 to 5:00"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not JSON: .* column 2"),
        ("[" * 200_000, "not JSON"),
        ('["a"]', "expected a JSON object, got list"),
        ('{"description": "x"}', 'key "attributes" is missing'),
        ('{"attributes": {"name": "A"}}', 'key "description" is missing'),
        ('{"attributes": ["A"], "description": "x"}', '"attributes" must be an object, not list'),
        ('{"attributes": {}, "description": "x"}', "there are no attributes"),
        ('{"attributes": {"rooms": 4}, "description": "x"}', '"rooms" must be text, not int'),
        ('{"attributes": {"name": " "}, "description": "x"}', '"name" is empty'),
        ('{"attributes": {"": "A"}, "description": "x"}', "an attribute has an empty name"),
        ('{"attributes": {"name": "A"}, "description": ""}', "description is empty"),
        ('{"attributes": {"name": "A"}, "description": null}', "description must be text"),
        ('{"attributes": {"name": "A\\nB"}, "description": "x"}', '"name" holds a line break'),
        ('{"attributes": {"a": "1", "a": "2"}, "description": "x"}', 'key "a" is there twice'),
    ],
)
def test_malformed_json_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n", "utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load_records(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("name : A | area : B", r'no "\|\|".*\.jsonl'),
        ("name : A | area||x", "attribute 'area' has no \":\""),
        ("name : A | area : ||x", '"area" is empty'),
        (" : A||x", "an attribute has an empty name"),
        ("name : A|| ", "description is empty"),
        ("||x", "attribute '' has no \":\""),
        ("name : A | name : B||x", 'key "name" is there twice'),
    ],
)
def test_malformed_text_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "mine.txt"
    path.write_text(f"name : A||x\n{line}\n", "utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load_records(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file_is_an_error(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{name}: no records"):
        load_records(path)


def test_wrong_encoding_and_missing_file(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("name : A||x\nname : Café||x\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt, line 2: not UTF-8"):
        load_records(path)
    with pytest.raises(FileNotFoundError):
        load_records(tmp_path / "none.jsonl")


def test_a_file_that_was_cut_short(tmp_path):
    """Never a record that nobody wrote; how many lines there were, nothing tells."""
    whole = load_descriptions("heldout")[:12]
    lines = [
        json.dumps({"attributes": dict(one.attributes), "description": one.description})
        for one in whole
    ]
    path = tmp_path / "mine.jsonl"
    content = "\n".join(lines).encode()
    for i in range(1, 17):
        path.write_bytes(content[: len(content) * i // 17])
        with pytest.raises(ValueError, match=r"mine\.jsonl, line \d+: not JSON"):
            load_records(path)
    for i in range(1, 12):
        path.write_text("\n".join(lines[:i]), "utf-8")
        assert load_records(path) == whole[:i]
    path.write_text(lines[0].replace('"name": "', '"size": 1' + "0" * 5000 + ', "name": "'))
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 1: not JSON that can be read"):
        load_records(path)
