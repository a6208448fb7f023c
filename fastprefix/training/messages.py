"""What went wrong, in the words of a message to the user."""

from __future__ import annotations

import os
import re


def reason(error: BaseException) -> str:
    """An error's message without the error number of the operating system."""
    if isinstance(error, OSError) and error.strerror:
        what = error.strerror[0].lower() + error.strerror[1:]
        return what if error.filename is None else f"{os.fsdecode(error.filename)}: {what}"
    if isinstance(error, MemoryError):
        return "not enough memory"
    message = str(error).partition("\nException raised from")[0].strip()
    message = re.sub(r"\[Errno -?\d+\] ?| ?\(os error \d+\)", "", message)
    if not message:
        return type(error).__name__
    # the message of these is only a name
    told_by_kind = isinstance(error, (LookupError, AttributeError, AssertionError))
    return f"{type(error).__name__}: {message}" if told_by_kind else message
