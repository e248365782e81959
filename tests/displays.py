"""Check what a notebook shows of a record."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from widefield.report import Report

_SINGLE = {"img", "br", "hr", "meta", "link", "input"}


class _Balanced(HTMLParser):
    """Raise AssertionError for a tag that is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in _SINGLE:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def assert_displays(found: Report, *texts: str) -> None:
    """Check that a record displays a table or a picture as well-formed HTML that has these texts, escaped."""
    shown = found._repr_html_()
    parser = _Balanced()
    parser.feed(shown)
    parser.close()
    assert not parser.open
    assert re.search(r"<table\b.*<td\b|<img [^>]*src=.data:image/(png|jpeg);base64,[\w+/]", shown, re.DOTALL)
    said = " ".join(parser.texts)
    for text in texts:
        assert text in said, f"{text!r} is not shown, or not escaped"
    assert str(found).strip()
