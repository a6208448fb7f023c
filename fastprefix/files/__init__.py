"""Files that are written whole or not at all, and read only if they are what was written.

Until a file is complete and on the disk, it lies in a folder of its own, ``.fastprefix-*.partial``.
Then it takes its place by a rename. A process that is killed leaves at most such a folder. Nobody
reads it, and the next process that writes there removes it.

Several files that belong together, such as an adapter's configuration and its weights, take their
places one after the other, because no rename moves them all at once. When all of them are complete,
their folder is renamed to ``.fastprefix-*.whole``. If the process is killed after that, the next
reader or writer of ours moves the remaining files to their places first. Another library that reads
before that, for example PEFT, may find some files of the old saving and some of the new one.

Each safetensors file of ours holds a sha256 of its content, including names and metadata. Files
without a sha256, which PEFT and older versions of ours write, are read too. In those a damaged
number is only noticed if it is a NaN or an infinity.
"""

from fastprefix.files.digests import DAMAGED, digest
from fastprefix.files.errors import reason
from fastprefix.files.json_files import json_object, json_text, read_json, sealed, unsealed
from fastprefix.files.lock import locked
from fastprefix.files.partial_folders import is_leftover
from fastprefix.files.safetensors_files import (
    header_bytes,
    opened,
    read_safetensors,
    write_safetensors,
)
from fastprefix.files.together import GONE, finish, remove_leftovers, written_together
from fastprefix.files.whole import written_whole

__all__ = [
    "DAMAGED",
    "GONE",
    "digest",
    "finish",
    "header_bytes",
    "is_leftover",
    "json_object",
    "json_text",
    "locked",
    "opened",
    "read_json",
    "read_safetensors",
    "reason",
    "remove_leftovers",
    "sealed",
    "unsealed",
    "write_safetensors",
    "written_together",
    "written_whole",
]
