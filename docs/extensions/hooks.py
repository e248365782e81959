"""What MkDocs does beyond its plugins: formulas as MathML, notebooks, and a check that no markup is left over."""

from __future__ import annotations

import html
import logging
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

NOTEBOOKS = Path(__file__).parents[2] / "examples"
LOG = logging.getLogger("mkdocs.hooks")  # warnings stop a strict build
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
CODE = re.compile(r"<(pre|code)\b.*?</\1>", re.DOTALL)
TAGS = re.compile(r"<[^>]+>")
LEFT_OVER = re.compile(r"\$\$|--8<|--8&lt;|:(?:attr|class|data|func|meth|mod):|\\(?:sum|frac|sigma|mathrm)\b")


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Add the notebooks of the examples, for download."""
    for path in NOTEBOOKS.glob("*.ipynb"):
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_content(content: str, **kwargs: Any) -> str:
    """Turn formulas, which pymdownx.arithmatex has marked, into MathML, which browsers show without a script."""
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    kind = "block" if found[1] == "div" else "inline"
    formula = convert(html.unescape(found[2]).strip(), display=kind)
    return f'<div class="formula">{formula}</div>' if kind == "block" else formula


def on_post_page(output: str, page: Any, **kwargs: Any) -> str:
    """Warn of markup that no extension has read."""
    article = output.partition("<article")[2].partition("</article>")[0]
    text = TAGS.sub("", CODE.sub("", article))
    for found in LEFT_OVER.finditer(text):
        near = " ".join(text[max(0, found.start() - 40) : found.end() + 40].split())
        LOG.warning(f"{page.file.src_path} shows markup: ... {near} ...")
    return output
