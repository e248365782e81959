"""Make pages and their parts with HTML; a page embeds its pictures, so that it is a single file."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from widefield.report._figures import png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #1f6f8b; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 68rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.9rem; margin-bottom: .25rem; } h2 { margin-top: 2.5rem; font-size: 1.3rem; }
a { color: var(--accent); } p, li { max-width: 48rem; } .lead { opacity: .8; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .4rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
thead th { border-bottom: 2px solid var(--accent); vertical-align: bottom; white-space: normal; }
tbody tr:hover { background: var(--soft); }
figure { margin: 1rem 0; } figure img { max-width: 100%; border-radius: 6px; background: white; }
figcaption, footer { font-size: .9rem; opacity: .75; } footer { margin-top: 3rem; border-top: 1px solid var(--line); }
code { background: var(--soft); padding: .1em .35em; border-radius: 4px; }
.cards { display: flex; flex-wrap: wrap; gap: 1.25rem; align-items: flex-start; }
.cards .card { flex: 1 1 17rem; max-width: 26rem; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: .8rem; min-width: 0; box-sizing: border-box; }
.stack .card { margin-bottom: 1.25rem; }
.card h3 { font-size: .95rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
.card p { font-size: .9rem; margin: .6rem 0 0; }
.views { display: flex; flex-wrap: wrap; gap: .6rem; } .views figure { flex: 1 1 13rem; margin: 0; max-width: 31rem; }
.views img { width: 100%; display: block; border-radius: 6px; }
.bars { display: grid; grid-template-columns: minmax(4rem, auto) minmax(4rem, 1fr) auto; gap: .3rem .6rem; }
.bars { align-items: center; font-size: .9rem; margin-top: .7rem; font-variant-numeric: tabular-nums; }
.bars .name { overflow-wrap: anywhere; max-width: 11rem; } .bars .share { text-align: right; }
.bars .track { background: var(--soft); border-radius: 3px; height: .65rem; }
.bars .track i { display: block; height: 100%; border-radius: 3px; background: var(--accent); min-width: 2px; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; margin: .7rem 0 0; list-style: none; }
.legend li { font-size: .9rem; } .legend i { display: inline-block; width: .85em; height: .85em; margin-right: .4em; }
.legend i { border-radius: 3px; border: 1px solid #8888; vertical-align: -.08em; }
@media (prefers-color-scheme: dark) { :root { --accent: #5bb5d6; } }
"""


def page(title: str, lead: str, sections: Sequence[tuple[str, str]], footer: Mapping[str, str]) -> str:
    """Return a complete HTML document.

    Args:
        title, lead: plain text.
        sections: (heading, HTML body).
        footer: facts such as the machine and versions, plain text.
    """
    body = "".join(f"<section><h2>{html.escape(heading)}</h2>{content}</section>" for heading, content in sections)
    facts = " · ".join(f"{html.escape(key)} {html.escape(value)}" for key, value in footer.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f'<body><h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>{body}'
        f"<footer><p>{facts}</p></footer></body></html>\n"
    )


def paragraph(text: str) -> str:
    """Return plain text as an HTML paragraph."""
    return f"<p>{html.escape(text)}</p>"


def link(place: str, text: str) -> str:
    """Return a paragraph that links to a file, by its path relative to the page; both are plain text."""
    return f'<p><a href="{html.escape(place)}">{html.escape(text)}</a></p>'


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows as an HTML table; the keys of the first row are the columns."""
    head = "".join(f"<th>{html.escape(key)}</th>" for key in rows[0])
    lines = ("".join(f"<td>{html.escape(row[key])}</td>" for key in rows[0]) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(figure: Figure, caption: str) -> str:
    """Return a figure as an HTML figure with an embedded PNG."""
    return embedded(png(figure), "png", caption)


def embedded(file: bytes, kind: str, caption: str) -> str:
    """Return an image file of a kind, "png" or "jpeg", as an HTML figure that holds it."""
    data = base64.b64encode(file).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/{kind};base64,{data}"><figcaption>{text}</figcaption></figure>'


def styled(body: str) -> str:
    """Return HTML with the style of its cards, bars and legends, for a notebook; a page has it already."""
    rules = "".join(
        line for line in _STYLE.splitlines() if line.startswith((".card", ".stack", ".views", ".bars", ".legend"))
    )
    return f"<style>.widefield {{ --line: #8884; --soft: #8882; --accent: #3a8fae; }} {rules}</style>" + (
        f'<div class="widefield">{body}</div>'
    )


def card(title: str, body: str) -> str:
    """Return a framed block: a plain-text title and HTML."""
    return f'<div class="card"><h3>{html.escape(title)}</h3>{body}</div>'


def cards(blocks: Sequence[str], *, wide: bool = False) -> str:
    """Return cards in as many columns as fit the window, or wide ones below one another."""
    return f'<div class="{"stack" if wide else "cards"}">{"".join(blocks)}</div>'


def views(figures: Sequence[str]) -> str:
    """Return HTML figures side by side, or below one another if the window is narrow."""
    return f'<div class="views">{"".join(figures)}</div>'


def bars(shares: Mapping[str, float]) -> str:
    """Return named shares, from 0 to 1, as horizontal bars with percentages."""
    lines = (
        f'<span class="name">{html.escape(name)}</span>'
        f'<span class="track"><i style="width:{100 * share:.1f}%"></i></span>'
        f'<span class="share">{100 * share:.1f} %</span>'
        for name, share in shares.items()
    )
    return f'<div class="bars">{"".join(lines)}</div>'


def legend(entries: Sequence[tuple[Sequence[int], str]]) -> str:
    """Return a list of colors, (red, green, blue) from 0 to 255, and their meanings."""
    items = (
        f'<li><i style="background:rgb({red},{green},{blue})"></i>{html.escape(text)}</li>'
        for (red, green, blue), text in entries
    )
    return f'<ul class="legend">{"".join(items)}</ul>'
