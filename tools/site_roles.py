"""Makes the docstrings fit the site: roles become links, and an example is shown as code.

An extension of griffe, which reads the docstrings for mkdocstrings. A role such as
``:func:`fastprefix.patch_model``` becomes a link to the name's entry in the reference if there is
one, and code otherwise. griffe knows the heading "Examples:" only.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(?P<short>~?)(?P<name>[\w.]+)`")


EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Roles(Extension):
    """Rewrites every docstring."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub("Examples:", linked(obj.docstring.value, obj))


def linked(text: str, obj: Object) -> str:
    """A docstring without roles. A name that is no whole path is looked for around `obj`."""

    def link(match: re.Match[str]) -> str:
        name = match["name"]
        shown = name.rpartition(".")[2] if match["short"] else name
        return f'<autoref optional identifier="{_path(name, obj)}">`{shown}`</autoref>'

    return ROLE.sub(link, text)


def _path(name: str, obj: Object) -> str:
    """The whole path of a name, as Python would find it: from the inside to the outside."""
    if name.startswith("fastprefix."):
        return name
    around: Any = obj
    while around is not None:
        first, _, rest = name.partition(".")
        if first in around.members:
            found = around.members[first]
            path = found.target_path if found.is_alias else found.path  # where it is declared
            return f"{path}.{rest}" if rest else path
        around = around.parent
    return name
