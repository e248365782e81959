"""Our pages in a browser: nothing sticks out on a phone, contents lead somewhere, figures open and have dark colors."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from browsing import WIDTH, needs_browser, probe
from widefield import demo, report

PAGES = ["/report.html", "/mixtures.html", "/blocks.html"]
LONG = "stages.0.blocks.0.a_name_without_any_place_to_break_it" * 3


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the demo's page, the report on its three runs, and a page with every kind of block."""
    folder = tmp_path_factory.mktemp("pages")
    small = ["--epochs", "1", "--schedule.warmup_epochs", "0", "--model.args.dims", "[4, 8, 8, 8]"]
    demo.run(["digits"], folder, small)
    (folder / "blocks.html").write_text(blocks())
    return folder


def blocks() -> str:
    """Return a page with blocks that hold long words, wide tables and large pictures."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((300, 1500, 3), np.uint8)).save(buffer, "png")
    photo = report.Photo(buffer.getvalue(), "png", LONG)
    row = {f"{key} {LONG}": LONG for key in "abcdef"}
    parts: list[report.Part] = [
        LONG, report.Table([row]), report.Table([row] * 9), report.Table([row] * 60, LONG), photo,
        report.Plot(report.curves({"a": ([1, 2], [3, 4])}, "x", "y"), LONG), report.Fold(LONG, [LONG]),
        report.Cards([report.Card(LONG, [report.Views([photo, photo]), report.Bars({LONG: 0.5})])] * 3),
        report.Cards([report.Card(LONG, [report.Views([photo])])], wide=True),
        report.Legend([((1, 2, 3), LONG)]), report.Link("https://example.org", LONG), report.Terms({LONG: LONG}),
    ]  # fmt: skip
    return report.page(LONG, LONG, [report.Section(LONG, parts)] * 4, {LONG: LONG}, [LONG])


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_fit_a_phone_and_show_figures_in_the_readers_colors(pages: Path, tmp_path: Path, dark: bool) -> None:
    found: dict[str, Any]
    found, console = probe(pages, PAGES, tmp_path, dark=dark)
    assert not console
    for name, page in found.items():
        assert (page["over"], page["broken"], page["lost"]) == (0, [], []), (name, page["wide"])
        assert page["figures"] > 0
        assert page["dark"] == (page["figures"] if dark else 0)
        assert page["ground"] == ("rgb(22, 24, 27)" if dark else "rgb(255, 255, 255)")
        assert page["zoomed"]["before"] < WIDTH < page["zoomed"]["after"]
        assert page["zoomed"]["covers"] == 800
