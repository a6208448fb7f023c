"""The parts of a sentence the domain tables are written in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["pre", "post", "with", "verb", "neg"]
Plan = Literal["joined", "apposition", "relative", "semicolon"]

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# Decided by sound, not spelling: "a ukulele", "an hour", "an 18 V drill", "an 8 km path".
_SOUNDS_LIKE_A_CONSONANT = re.compile(r"(?:uni|uku|use|eu|one\b|one-)", re.IGNORECASE)
_SOUNDS_LIKE_A_VOWEL = re.compile(r"(?:[aeiou]|hour|honest|8|(?:11|18)(?!\d))", re.IGNORECASE)


def article(text: str) -> str:
    """Return ``"a"`` or ``"an"``, whichever goes before ``text``."""
    # A year is read in pairs of digits, so 1894 begins as 18 does; 1,800 does not.
    start = text[:2] if re.match(r"\d{4}(?!\d)", text) else text
    if _SOUNDS_LIKE_A_CONSONANT.match(start):
        return "a"
    return "an" if _SOUNDS_LIKE_A_VOWEL.match(start) else "a"


def spell(number: str) -> str:
    """Return whole numbers up to ten as words, anything else as it is."""
    return _NUMBERS[int(number)] if number.isdigit() and int(number) <= 10 else number


def join(parts: Sequence[str]) -> str:
    """Join ``parts`` as an English list: ``a``, ``a and b``, ``a, b and c``."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


@dataclass(frozen=True)
class Phrase:
    """One way to say one value, and the place in the sentence where it goes.

    Roles: ``pre`` stands before the noun, ``post`` right after it, ``with`` is a noun phrase in
    the list after "with", ``verb`` is a verb phrase in the present tense, and ``neg`` is a verb
    phrase that speaks against the thing, so that "but" or "although" can lead to it.
    """

    role: Role
    text: str

    def of(self, value: str) -> Phrase:
        """Fill in the value: ``{v}`` as it is, ``{n}`` spelled out, ``{a}`` with its article."""
        filled = self.text.format(v=value, n=spell(value), a=f"{article(value)} {value}")
        return Phrase(self.role, filled)


def pre(text: str) -> Phrase:
    """Return a phrase for before the noun."""
    return Phrase("pre", text)


def post(text: str) -> Phrase:
    """Return a phrase for right after the noun."""
    return Phrase("post", text)


def have(text: str) -> Phrase:
    """Return a noun phrase for the list after "with"."""
    return Phrase("with", text)


def verb(text: str) -> Phrase:
    """Return a verb phrase."""
    return Phrase("verb", text)


def neg(text: str) -> Phrase:
    """Return a verb phrase that speaks against the thing."""
    return Phrase("neg", text)


Values = dict[str, tuple[Phrase, ...]]


def each(values: str, *phrases: Phrase) -> Values:
    """Give every one of the comma-separated ``values`` the same phrases, filled in."""
    # ", " separates, so that "3,000" stays one value.
    return {value: tuple(p.of(value) for p in phrases) for value in values.split(", ")}


@dataclass(frozen=True)
class Names:
    """Names of two parts; those that begin with one of ``unseen`` are kept for the held-out set."""

    pattern: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    unseen: tuple[str, ...]

    def seen_names(self) -> list[str]:
        """Return every name that training may use."""
        return [self.pattern.format(a, b) for a in self.first for b in self.second]

    def unseen_names(self) -> list[str]:
        """Return every name that only the held-out set uses."""
        return [self.pattern.format(a, b) for a in self.unseen for b in self.second]


def names(pattern: str, first: str, second: str, unseen: str) -> Names:
    """Return the names built from whitespace-separated words."""
    return Names(pattern, *(tuple(words.split()) for words in (first, second, unseen)))


@dataclass(frozen=True)
class Domain:
    """One kind of thing: its names, its nouns, its attributes and its house style.

    ``slots`` maps each attribute to its values and their phrases, in the order of the prompt and,
    within one role, of the sentence. ``plans`` are the sentence plans to choose from where they
    fit, and ``contrast`` is what leads to the phrases that speak against the thing.
    """

    key: str
    names: Names
    types: tuple[str, ...]
    slots: dict[str, Values]
    plans: tuple[Plan, ...]
    contrast: Literal[" but ", ", although it "]
