"""Which side of a split a text is on, read off the text itself."""

from __future__ import annotations

import hashlib
from typing import Literal

Side = Literal["train", "heldout"]


def side_of(text: str, heldout_share: float) -> Side:
    """The side of a text. It depends on nothing else, and white space does not count."""
    digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") < heldout_share * 2**64 else "train"
