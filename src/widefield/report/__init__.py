"""Make tables, figures and pages with templates, Markdown and matplotlib.

Tables take rows (mappings with the same keys, values already formatted). Figures take plain lists and arrays and return
a matplotlib Figure, which needs no display. A page is a title, sections of blocks (`Table`, `Plot`, `Cards`) and
paragraphs of plain text, which is escaped. It embeds its pictures, so it is a single file.
"""

from widefield.report._blocks import (
    Bars,
    Block,
    Card,
    Cards,
    Fold,
    Legend,
    Link,
    Part,
    Photo,
    Plot,
    Table,
    Terms,
    Views,
)
from widefield.report._drawing import drawing, png
from widefield.report._figures import (
    COLORS,
    COLUMN,
    FIXED,
    MARKERS,
    PAGE,
    blank,
    curves,
    examples,
    expert_colors,
    paper,
    readable,
)
from widefield.report._page import Section, fragment, page, styled
from widefield.report._record import Listing, Report, markdown
from widefield.report._svg import svg

__all__ = [
    "COLORS",
    "COLUMN",
    "FIXED",
    "MARKERS",
    "PAGE",
    "Bars",
    "Block",
    "Card",
    "Cards",
    "Fold",
    "Legend",
    "Link",
    "Listing",
    "Part",
    "Photo",
    "Plot",
    "Report",
    "Section",
    "Table",
    "Terms",
    "Views",
    "blank",
    "curves",
    "drawing",
    "examples",
    "expert_colors",
    "fragment",
    "markdown",
    "page",
    "paper",
    "png",
    "readable",
    "styled",
    "svg",
]
