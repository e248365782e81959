"""Roles of docstrings, such as ``:func:`plan```, become links on the API pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Replace roles by references that mkdocs-autorefs turns into links, if there is such a place; else by the name."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Go through the docstrings of a package whose modules are all known."""
        self._walk(pkg)

    def _walk(self, obj: griffe.Object) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(
                lambda found: linked(obj, found[2], short=bool(found[1])), obj.docstring.value
            )
        for member in obj.members.values():
            if not member.is_alias:
                self._walk(member)  # type: ignore[arg-type]


def linked(obj: griffe.Object, name: str, short: bool) -> str:
    """Return a reference to what ``name`` means in the docstring of ``obj``; it shows the last part if ``short``."""
    shown = name.rpartition(".")[2] if short else name.strip(".")
    return f'<autoref identifier="{target(obj, name)}" optional><code>{shown}</code></autoref>'


def target(obj: griffe.Object, name: str) -> str:
    """Return the path of the object that ``name`` means in the docstring of ``obj``, as far as it is known."""
    if name.startswith("."):
        return f"{obj.module.path.rpartition('.')[0]}{name}"
    first, _, rest = name.partition(".")
    try:
        found = obj.resolve(first)
    except griffe.NameResolutionError:
        found = first
    path = f"{found}.{rest}" if rest else found
    try:
        return str(obj.modules_collection[path].canonical_path)
    except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
        return path
