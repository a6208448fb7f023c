"""Which side of a split a text is on, read off the text itself."""

from __future__ import annotations

import hashlib


def position(text: str) -> float:
    """A number from 0 to 1 for a text; white space does not count.

    It depends on nothing else, and it is spread evenly over many texts. Therefore "below 0.2" is a
    fifth of the texts, and a text that is there twice is on one side.
    """
    digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
