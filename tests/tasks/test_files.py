"""Files in a data set's own format, with their mistakes, and what becomes of their rows."""

import json
from pathlib import Path

import pytest

import fastprefix.tasks
from fastprefix.tasks import WrittenText, load_examples
from fastprefix.tasks.files import folders_of_texts

GOOD = '{"attributes": {"name": "Alder Court", "type": "inn"}, "description": "It is an inn."}'
SHIPPED = Path(fastprefix.tasks.__file__).parent / "data" / "descriptions-heldout.jsonl"


def read(path, task="descriptions", split="test"):
    return load_examples(task, split, data_files={split: path})


def test_shipped_splits():
    train = load_examples("descriptions")
    assert len(train) + len(load_examples("descriptions", "validation")) == 640
    assert len(load_examples("descriptions", "test")) == 80
    assert all(example.source.startswith("name: ") for example in train)
    first = json.loads(SHIPPED.read_text("utf-8").splitlines()[0])
    assert load_examples("descriptions", "test")[0] == WrittenText(
        "name: Calmwise | type: recipe app | price: £40 a year | storage: 240 MB | languages: 20",
        (first["description"],),
    )


def test_jsonl_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    # A byte-order mark, CRLF, a blank line, and a line separator inside a string.
    other = GOOD.replace("Alder", "Elder").replace("an inn", "a\u2028b")
    path.write_bytes(("\ufeff" + GOOD + "\r\n\n" + other + "\n").encode("utf-8"))
    first, second = read(str(path))
    assert first == WrittenText("name: Alder Court | type: inn", ("It is an inn.",))
    assert second.targets == ("It is a\u2028b.",)


E2E = """name : The Mill | hours : 9:00 to 5:00||The Mill opens at nine .
name : The Mill | hours : 9:00 to 5:00||At nine The Mill opens .

name : The Inn||The Inn .
"""


@pytest.mark.parametrize("task", ["descriptions", "e2e_nlg"])
def test_text_of_e2e(tmp_path, task):
    """Every pair trains; otherwise a meaning has all its sentences."""
    path = tmp_path / "valid.txt"
    path.write_text(E2E, "utf-8")
    mill, inn = "name: The Mill | hours: 9:00 to 5:00", "name: The Inn"
    sentences = ("The Mill opens at nine .", "At nine The Mill opens .")
    assert read(path, task) == [WrittenText(mill, sentences), WrittenText(inn, ("The Inn .",))]
    both = {"train": path, "validation": path}
    assert load_examples(task, "train", data_files=both) == [
        WrittenText(mill, sentences[:1]),
        WrittenText(mill, sentences[1:]),
        WrittenText(inn, ("The Inn .",)),
    ]


WEBNLG = {
    "entries": [
        {
            "1": {
                "category": "Airport",
                "lexicalisations": [
                    {"comment": "good", "lang": "", "lex": "Jacob leads Aarhus.", "xml_id": "Id1"},
                    {"comment": "toFix", "lang": "", "lex": "Jacob leads.", "xml_id": "Id2"},
                    {"comment": "good", "lang": "", "lex": "Aarhus has Jacob.", "xml_id": "Id3"},
                ],
                "modifiedtripleset": [
                    {"object": "Jacob", "property": "leaderName", "subject": "Aarhus"},
                    {"object": "25.0", "property": "elevation", "subject": "Aarhus_Airport"},
                ],
            }
        }
    ]
}


def test_json_of_webnlg(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(WEBNLG), "utf-8")
    source = "Aarhus | leaderName | Jacob ; Aarhus_Airport | elevation | 25.0"
    texts = ("Jacob leads Aarhus.", "Aarhus has Jacob.")
    assert read(path, "webnlg") == [WrittenText(source, texts)]
    both = {"train": path, "validation": path}
    assert load_examples("webnlg", "train", data_files=both) == [
        WrittenText(source, (text,)) for text in texts
    ]
    del WEBNLG["entries"][0]["1"]["modifiedtripleset"][1]["object"]
    path.write_text(json.dumps(WEBNLG), "utf-8")
    with pytest.raises(ValueError, match=r"^data_files: .*dev\.json, entry 1: not as WebNLG .*obj"):
        read(path, "webnlg")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 3: not JSON: .* column 2"),
        ("[" * 200_000, "line 3: not JSON"),
        ('["a"]', "line 3: expected a JSON object, got list"),
        (
            '{"attributes": {"a": "1", "a": "2"}, "description": "x"}',
            'line 3: the key "a" is there',
        ),
        ('{"description": "x"}', "row 2: 'attributes' is missing"),
        ('{"attributes": {"name": "A"}}', "row 2: 'description' is missing"),
        ('{"attributes": ["A"], "description": "x"}', "row 2: attributes: got .*takes names with"),
        ('{"attributes": {}, "description": "x"}', "row 2: attributes: got none"),
        ('{"attributes": {"rooms": 4}, "description": "x"}', "row 2: rooms: got int, takes text"),
        ('{"attributes": {"name": " "}, "description": "x"}', "row 2: name: got an empty text"),
        ('{"attributes": {"": "A"}, "description": "x"}', "row 2: attributes: .*an empty name"),
        ('{"attributes": {"name": "A"}, "description": ""}', "row 2: description: got an empty"),
        ('{"attributes": {"name": "A"}, "description": null}', "row 2: description: got NoneType"),
        ('{"attributes": {"a": "A\\nB"}, "description": "x"}', "row 2: attributes: .*line breaks"),
    ],
)
def test_malformed_json_names_file_and_place(tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n", "utf-8")
    with pytest.raises(ValueError, match=rf"mine\.jsonl, {message}"):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("name : A | area : B", r'no "\|\|".*\.jsonl'),
        ("name : A | area||x", "attribute 'area' has no \":\""),
        ("||x", "attribute '' has no \":\""),
        ("name : A | name : B||x", 'key "name" is there twice'),
    ],
)
def test_malformed_text_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "mine.txt"
    path.write_text(f"name : A||x\n{line}\n", "utf-8")
    with pytest.raises(ValueError, match=rf"^data_files: .*mine\.txt, line 2: .*{message}"):
        read(path)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file_is_an_error(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=f"split: test of descriptions has no examples.*{name}"):
        read(path)


def test_wrong_encoding(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("name : A||x\nname : Café||x\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt, line 2: not UTF-8"):
        read(path)


def test_a_file_that_was_cut_short(tmp_path):
    """Never a record that nobody wrote; how many lines there were, nothing tells."""
    content = b"\n".join(SHIPPED.read_bytes().split(b"\n")[:12])
    whole = read(SHIPPED)[:12]
    path = tmp_path / "mine.jsonl"
    for i in range(1, 17):
        path.write_bytes(content[: len(content) * i // 17])
        with pytest.raises(ValueError, match=r"mine\.jsonl, line \d+: not JSON"):
            read(path)
    for i in range(1, 12):
        path.write_bytes(b"\n".join(content.split(b"\n")[:i]))
        assert read(path) == whole[:i]
    path.write_bytes(content.replace(b'"name": "', b'"size": 1' + b"0" * 5000 + b', "name": "'))
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 1: not JSON that can be read"):
        read(path)


def test_folders_are_classes(tmp_path):
    for folder, texts in {"b": ["second", "third"], "a": ["first\n", " same text"]}.items():
        (tmp_path / folder).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / folder / f"{i}.txt").write_text(text)
    (tmp_path / "a" / "9.txt").write_bytes("£5".encode("latin-1"))
    (tmp_path / "a" / "notes.md").write_text("no text")
    (tmp_path / "readme.txt").write_text("no text either")
    assert [(row["text"], row["label"]) for row in folders_of_texts(tmp_path)] == [
        ("first", "a"),
        ("same text", "a"),
        ("£5", "a"),
        ("second", "b"),
        ("third", "b"),
    ]
