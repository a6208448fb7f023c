"""The shipped sentences are the generator's, say what their attributes say, and read well."""

import json
import re
from collections import Counter
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest

from descriptions.phrases import article, join, neg, post, pre, spell, verb
from fastprefix.tasks.files import description_lines
from generate_descriptions import DOMAINS, generate, main, sentence, to_lines

SPLITS = ("train", "heldout")


def load_descriptions(split):
    """The records that are shipped, with their attributes and their description."""
    folder = Path(str(resources.files("fastprefix.tasks"))) / "data"
    return [
        SimpleNamespace(**row) for row in description_lines(folder / f"descriptions-{split}.jsonl")
    ]


RECORDS = [record for split in SPLITS for record in load_descriptions(split)]
DOMAIN_OF = {noun: domain for domain in DOMAINS for noun in domain.types}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ARTICLE_SLIP = re.compile(
    r"\ba ((?!one-)[aeioAEIO]|(8|11|18)(?!\d))|\ban (?![aeioAEIO]|8|11|18|un)"
)
NEGATION = re.compile(r"\b(not|no|without|cannot)\b")


def says(description, text):
    # "£6" is not said by "£6.50", nor "8 m" by "10.8 m" or "8 months".
    return re.search(rf"(?<![\w.,]){re.escape(text)}(?!\w|[.,]\d)", description) is not None


def unfaithful(attributes, description):
    """Return the attributes that the description leaves out, gets wrong or makes up."""
    wrong = []
    body = description.removeprefix(attributes["name"])
    if body == description or not says(body, attributes["type"]):
        wrong.append("name or type")
    for key, values in DOMAIN_OF[attributes["type"]].slots.items():
        said = {
            value
            for value, phrases in values.items()
            if any(says(body, phrase.text) for phrase in phrases)
        }
        if said != ({attributes[key]} if key in attributes else set()):
            wrong.append(key)
    return wrong


def test_shipped_files_are_what_the_generator_makes():
    made = generate()
    for split in SPLITS:
        file = resources.files("fastprefix.tasks") / "data" / f"descriptions-{split}.jsonl"
        assert file.read_bytes() == to_lines(made[split]).encode("utf-8"), split


def test_command_writes_both_files_and_another_seed_differs(tmp_path):
    main(["--out", str(tmp_path), "--seed", "3", "--train", "20", "--heldout", "10"])
    lines = (tmp_path / "descriptions-train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 20
    assert len((tmp_path / "descriptions-heldout.jsonl").read_text("utf-8").splitlines()) == 10
    assert [json.loads(line) for line in lines] == generate(3, 20, 10)["train"]
    assert generate(3, 20, 10) != generate(4, 20, 10)


@pytest.mark.parametrize(("train", "heldout"), [(645, 80), (640, 81), (7300, 80), (640, 2000)])
def test_sizes_that_cannot_be_made_are_refused(train, heldout):
    with pytest.raises(ValueError, match=r"multiples of 10|too few names"):
        generate(train=train, heldout=heldout)


def test_every_description_says_its_attributes_and_no_others():
    wrong = [
        (r.description, bad) for r in RECORDS if (bad := unfaithful(r.attributes, r.description))
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("description", "wrong"),
    [
        ("Elder Court, an inn with six rooms, costs £60 a night but does not take dogs.", []),
        ("Elder Court, an inn with six rooms, costs £60 a night.", ["dogs"]),
        ("Elder Court, an inn with six rooms, costs £60 a night and welcomes dogs.", ["dogs"]),
        (
            "Elder Court, an inn with four rooms, costs £60 a night but does not take dogs.",
            ["rooms"],
        ),
        (
            "Elder Court, a lively inn with six rooms, costs £60 a night but does not take dogs.",
            ["style"],
        ),
        (
            "Alder Court, an inn with six rooms, costs £60 a night but does not take dogs.",
            ["name or type"],
        ),
    ],
)
def test_the_faithfulness_check_itself_finds_what_is_wrong(description, wrong):
    attributes = {
        "name": "Elder Court",
        "type": "inn",
        "rooms": "6",
        "price": "£60 a night",
        "dogs": "no",
    }
    assert unfaithful(attributes, description) == wrong


def test_tables_keep_the_words_of_each_value():
    """What the tables say is held against the value itself, not only against the tables."""
    for domain in DOMAINS:
        for key, values in domain.slots.items():
            for value, phrases in values.items():
                assert phrases, (domain.key, key, value)
                for phrase in phrases:
                    where = (domain.key, key, value, phrase.text)
                    negated = bool(NEGATION.search(phrase.text))
                    if key == "adverts":
                        assert negated == (value == "no"), where
                    elif value in ("no", "none"):
                        assert negated, where
                    else:
                        assert not negated or value == "included", where
                    if value in ("yes", "no", "none", "included", "free"):
                        continue
                    words = value.removesuffix(" extra").split()
                    for word in words:
                        small = word.isdigit() and int(word) <= 10
                        spelled = NUMBERS[int(word)] if small else word
                        assert word in phrase.text or spelled in phrase.text, where


def test_no_attributes_occur_twice_even_without_the_name():
    keys = Counter(
        frozenset((k, v) for k, v in record.attributes.items() if k != "name") for record in RECORDS
    )
    assert keys.most_common(1)[0][1] == 1


def test_size_and_variety():
    train, heldout = (load_descriptions(split) for split in SPLITS)
    assert (len(train), len(heldout)) == (640, 80)
    assert {len(record.attributes) for record in RECORDS} == {3, 4, 5, 6}
    for records, share in ((train, 64), (heldout, 8)):
        domains = Counter(DOMAIN_OF[record.attributes["type"]].key for record in records)
        assert set(domains.values()) == {share}
        assert len(domains) == 10
    assert len({record.description for record in RECORDS}) == len(RECORDS)


def test_half_of_heldout_has_new_names_and_every_other_value_is_known():
    train, heldout = (load_descriptions(split) for split in SPLITS)
    names = {record.attributes["name"] for record in train}
    assert sum(record.attributes["name"] not in names for record in heldout) == 40
    items = {item for record in train for item in record.attributes.items() if item[0] != "name"}
    for record in heldout:
        assert set(list(record.attributes.items())[1:]) <= items


def test_each_is_one_tidy_sentence():
    for record in RECORDS:
        text = record.description
        assert text.startswith(record.attributes["name"]), text
        assert text.endswith(".")
        assert text[0].isupper()
        # The only full stops inside are those of decimals.
        assert not re.search(r"[.!?](?!\d)", text[:-1]), text
        assert not re.search(r"  | [,.;]|,,|\{|\}|\b(\w+) \1\b", text), text
        assert not ARTICLE_SLIP.search(text), text


def test_types_tell_the_domain_and_tables_are_well_formed():
    assert len(DOMAIN_OF) == sum(len(domain.types) for domain in DOMAINS)
    for domain in DOMAINS:
        assert 5 <= len(domain.slots) + 2 <= 8
        assert len(domain.plans) >= 2
        assert not set(domain.names.seen_names()) & set(domain.names.unseen_names())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("inn", "an"),
        ("hotel", "a"),
        ("ukulele", "a"),
        ("unused banjo", "an"),
        ("hour", "an"),
        ("one-year warranty", "a"),
        ("open tone", "an"),
        ("8 km path", "an"),
        ("eight-seat café", "an"),
        ("11-acre garden", "an"),
        ("18 V drill", "an"),
        ("180 W drill", "a"),
        ("1894 chapel", "an"),
        ("1,100 W saw", "a"),
        ("1,800 W saw", "a"),
        ("1100-year path", "an"),
        ("110 W saw", "a"),
        ("800 W saw", "an"),
        ("1974 film", "a"),
    ],
)
def test_article(text, expected):
    assert article(text) == expected


def test_numbers_and_lists():
    assert [spell(n) for n in ("2", "10", "11", "2.5", "3,000")] == [
        "two",
        "ten",
        "11",
        "2.5",
        "3,000",
    ]
    assert [join("abc"[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]


@pytest.mark.parametrize(
    ("phrases", "plan", "expected"),
    [
        ([pre("old")], "relative", "X is an old inn."),
        ([post("by the sea"), verb("costs £5")], "joined", "X is an inn by the sea and costs £5."),
        (
            [verb("costs £5"), neg("has no bar")],
            "relative",
            "X is an inn that costs £5 but has no bar.",
        ),
        (
            [neg("has no bar"), verb("costs £5")],
            "apposition",
            "X, an inn, costs £5 but has no bar.",
        ),
        ([neg("has no bar")], "apposition", "X, an inn, has no bar."),
        ([neg("has no bar")], "joined", "X is an inn but has no bar."),
        (
            [verb("a"), verb("b"), verb("c"), neg("d"), neg("e")],
            "semicolon",
            "X is an inn; it a, b and c but d and e.",
        ),
    ],
)
def test_plans(phrases, plan, expected):
    assert sentence("X", "inn", phrases, plan, " but ") == expected
