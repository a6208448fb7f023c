"""Makes the data set that ships with the package: ``python tools/generate_descriptions.py``.

Every sentence begins with the name and says what the thing is; what follows depends on which
attributes the record has, on the plans its domain favours, and on a choice of phrase per value.
The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from descriptions.phrases import Domain, Phrase, Plan, article, join
from descriptions.places import PLACES
from descriptions.things import THINGS
from fastprefix.files import written_whole

DOMAINS: tuple[Domain, ...] = PLACES + THINGS
SEED = 20
TRAIN_SIZE = 640
HELDOUT_SIZE = 80
DATA = Path(__file__).parents[1] / "fastprefix" / "tasks" / "data"

# How many attributes a record has besides its name and type: mostly three or four.
_EXTRA = (1, 2, 2, 3, 3, 3, 4, 4)

_Item = TypeVar("_Item")
Attributes = dict[str, str]


class Chooser:
    """Random choices built on ``Random.random`` alone.

    Python promises the same sequence in every version for that method only, not for ``choice``,
    ``sample`` or ``shuffle``.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._piles: dict[tuple[str, str], list[str]] = {}

    def pick(self, items: Sequence[_Item]) -> _Item:
        """Return one of ``items``."""
        return items[int(self._random.random() * len(items))]

    def shuffled(self, items: Sequence[_Item]) -> list[_Item]:
        """Return ``items`` in random order."""
        left, result = list(items), []
        while left:
            result.append(left.pop(int(self._random.random() * len(left))))
        return result

    def deal(self, pile: tuple[str, str], items: Sequence[str]) -> str:
        """Return one of ``items``, none a second time until each has had its turn.

        Where ``pick`` may leave a value out by chance, this gives each its share of the records.
        ``pile`` says which pile to deal from: two attributes that shared one would never both
        be "yes".
        """
        left = self._piles.setdefault(pile, [])
        if not left:
            left += self.shuffled(items)
        return left.pop()


def fitting_plans(phrases: Sequence[Phrase], plans: Sequence[Plan]) -> list[Plan]:
    """Return those of ``plans`` that read well with ``phrases``, or apposition if none does."""
    roles = [phrase.role for phrase in phrases]
    fits = {
        "apposition": True,
        "semicolon": True,
        # After "by the river" or "with a view", a "that" would seem to belong to the wrong noun.
        "relative": "post" not in roles and "with" not in roles,
        # "is an inn with a bar and eight rooms and costs ..." has one "and" too many.
        "joined": roles.count("verb") < 2 and roles.count("with") < 2,
    }
    return [plan for plan in plans if fits[plan]] or ["apposition"]


def sentence(name: str, noun: str, phrases: Sequence[Phrase], plan: Plan, contrast: str) -> str:
    """Return the sentence that says ``phrases`` of the ``noun`` called ``name``.

    Verb phrases that speak against the thing come last, led in by ``contrast`` unless nothing
    stands before them to contrast with.
    """
    by_role: dict[str, list[str]] = {role: [] for role in ("pre", "post", "with", "verb", "neg")}
    for phrase in phrases:
        by_role[phrase.role].append(phrase.text)
    head = " ".join([*by_role["pre"], noun, *by_role["post"]])
    if by_role["with"]:
        head += " with " + join(by_role["with"])
    head = f"{article(head)} {head}"
    good, bad = by_role["verb"], by_role["neg"]
    if not good and not bad:
        return f"{name} is {head}."
    if plan == "joined":
        return f"{name} is {join([head, *good])}{contrast if bad else ''}{join(bad)}."
    predicate = contrast.join(part for part in (join(good), join(bad)) if part)
    opening = {
        "apposition": f"{name}, {head}, ",
        "relative": f"{name} is {head} that ",
        "semicolon": f"{name} is {head}; it ",
    }
    return f"{opening[plan]}{predicate}."


def describe(domain: Domain, attributes: Attributes, chooser: Chooser) -> str:
    """Return one description of ``attributes`` in the style of ``domain``."""
    phrases = [
        chooser.pick(values[attributes[key]])
        for key, values in domain.slots.items()
        if key in attributes
    ]
    plan = chooser.pick(fitting_plans(phrases, domain.plans))
    return sentence(attributes["name"], attributes["type"], phrases, plan, domain.contrast)


def _without_name(attributes: Attributes) -> tuple[tuple[str, str], ...]:
    return tuple(item for item in attributes.items() if item[0] != "name")


def _draw(domain: Domain, name: str, chooser: Chooser) -> Attributes:
    chosen = chooser.shuffled(list(domain.slots))[: chooser.pick(_EXTRA)]
    return {
        "name": name,
        "type": chooser.deal((domain.key, "type"), domain.types),
        **{
            key: chooser.deal((domain.key, key), list(values))
            for key, values in domain.slots.items()
            if key in chosen
        },
    }


def _domain_records(
    domain: Domain, train: int, heldout: int, chooser: Chooser
) -> tuple[list[dict], list[dict]]:
    known = chooser.shuffled(domain.names.seen_names())[:train]
    unseen = chooser.shuffled(domain.names.unseen_names())[: heldout - heldout // 2]
    if len(known) < train or len(known) + len(unseen) < heldout:
        raise ValueError(f"the {domain.key} domain has too few names for {train} + {heldout}")
    used: set[tuple[tuple[str, str], ...]] = set()

    def records(names: Sequence[str]) -> list[dict]:
        made = []
        for name in names:
            attributes = _draw(domain, name, chooser)
            # A combination is new even without its name, or copying by heart would do.
            while _without_name(attributes) in used:
                attributes = _draw(domain, name, chooser)
            used.add(_without_name(attributes))
            description = describe(domain, attributes, chooser)
            made.append({"attributes": attributes, "description": description})
        return made

    kept = records(unseen + known[: heldout - len(unseen)])
    return records(known), kept


def generate(
    seed: int = SEED, train: int = TRAIN_SIZE, heldout: int = HELDOUT_SIZE
) -> dict[str, list[dict]]:
    """Return the records of both splits, as plain dictionaries under "train" and "heldout".

    No combination of attributes occurs twice, with or without its name, and half of the held-out
    names occur nowhere in training.

    Raises:
        ValueError: a size is not a multiple of the number of domains, or asks for more names
            than a domain has.
    """
    if train % len(DOMAINS) or heldout % len(DOMAINS):
        raise ValueError(f"both sizes must be multiples of {len(DOMAINS)}: {train}, {heldout}")
    chooser = Chooser(seed)
    splits: dict[str, list[dict]] = {"train": [], "heldout": []}
    for domain in DOMAINS:
        sizes = train // len(DOMAINS), heldout // len(DOMAINS)
        for split, records in zip(splits, _domain_records(domain, *sizes, chooser), strict=True):
            splits[split] += records
    return {split: chooser.shuffled(records) for split, records in splits.items()}


def to_lines(records: Sequence[dict]) -> str:
    """Return ``records`` as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description="Make the attributes-to-sentence data set.")
    parser.add_argument("--out", type=Path, default=DATA, help="the folder to write to")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--train", type=int, default=TRAIN_SIZE, help="number of records")
    parser.add_argument("--heldout", type=int, default=HELDOUT_SIZE, help="number of records")
    options = parser.parse_args(arguments)
    splits = generate(options.seed, options.train, options.heldout)
    options.out.mkdir(parents=True, exist_ok=True)
    for split, records in splits.items():
        path = options.out / f"descriptions-{split}.jsonl"
        with written_whole(path) as partial:
            partial.write_text(to_lines(records), encoding="utf-8", newline="\n")
        print(f"{path}: {len(records)} records")


if __name__ == "__main__":
    main()
