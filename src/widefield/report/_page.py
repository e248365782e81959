"""Write pages and fragments of pages with the templates next to this file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from widefield.report._blocks import Part

if TYPE_CHECKING:
    from jinja2 import Environment

_CONTENTS = 3
"""Pages with more sections begin with a list of them."""


@dataclass(frozen=True)
class Section:
    """A heading and what is below it: blocks, and paragraphs of plain text."""

    heading: str
    parts: Sequence[Part]


def page(
    title: str, lead: str, sections: Sequence[Section], footer: Mapping[str, str], headline: Sequence[str] = ()
) -> str:
    """Return a complete HTML document; it embeds its pictures and needs no other file.

    Args:
        title, lead: plain text.
        sections: the content; of more than three, the page has a list with links.
        footer: facts such as the machine and versions, plain text.
        headline: what was found, a sentence or two in each paragraph.
    """
    named = list(zip(_names([section.heading for section in sections]), sections, strict=True))
    template = _environment().get_template("page.html")
    return template.render(
        page=True, title=title, lead=lead, headline=headline, sections=named, footer=footer,
        contents=named if len(named) > _CONTENTS else (),
    )  # fmt: skip


def fragment(*parts: Part) -> str:
    """Return parts of a page as HTML, for a notebook: in light colors, and without the style of cards and bars."""
    return _environment().get_template("blocks.html").render(page=False, parts=parts)


def styled(*parts: Part) -> str:
    """Return parts of a page as HTML with the style of cards, bars and legends, for a notebook."""
    return _environment().get_template("notebook.html").render(page=False, parts=parts)


def _names(headings: Sequence[str]) -> list[str]:
    """Return a name for the address of each section, all of them different."""
    found: list[str] = []
    for heading in headings:
        plain = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") or "section"
        name, number = plain, 1
        while name in found:
            number += 1
            name = f"{plain}-{number}"
        found.append(name)
    return found


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # torch and plain text do without it

    return Environment(
        loader=PackageLoader("widefield.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
