"""Make tables, figures and pages with HTML, Markdown and matplotlib.

Tables take rows (mappings with the same keys, values already formatted). Figures take plain lists and arrays and return
a matplotlib Figure, which needs no display. A page embeds its pictures, so it is a single file.
"""

from widefield.report._figures import (
    COLORS,
    COLUMN,
    MARKERS,
    PAGE,
    blank,
    curves,
    drawing,
    examples,
    expert_colors,
    paper,
    png,
)
from widefield.report._html import (
    bars,
    card,
    cards,
    embedded,
    legend,
    link,
    page,
    paragraph,
    picture,
    styled,
    table,
    views,
)
from widefield.report._record import Report, markdown

__all__ = [
    "COLORS",
    "COLUMN",
    "MARKERS",
    "PAGE",
    "Report",
    "bars",
    "blank",
    "card",
    "cards",
    "curves",
    "drawing",
    "embedded",
    "examples",
    "expert_colors",
    "legend",
    "link",
    "markdown",
    "page",
    "paper",
    "paragraph",
    "picture",
    "png",
    "styled",
    "table",
    "views",
]
