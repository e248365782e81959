"""Tables on terminals of any width, and in pipes."""

from __future__ import annotations

import io
import itertools
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from widefield._tabular import folded, print_table

PATH = "/data/sets/imagenet_of_last_year/validation/with_corrected_labels"
ROWS = [
    {
        "model": f"morf_convnext_{size}",
        "data": PATH,
        "state": "finished [3, 5]",
        "images": "50000",
        "top1": "81.2%",
        "top5": "95.55%",
        "loss": "0.8765",
        "images/s": "1234",
        "remark": "trained for three hundred epochs, and evaluated twice",
    }
    for size in ("tiny", "small")
]
NUMBERS = ("images", "top1", "top5", "loss", "images/s")


def printed(width: int, *, terminal: bool = True, rows: list[dict[str, str]] = ROWS, **options: str) -> list[str]:
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=terminal, color_system=None)
    print_table(rows, NUMBERS, console=console, **options)
    return text.getvalue().splitlines()


def cells(lines: list[str]) -> dict[str, list[str]]:
    """Return the pieces of each column, by its heading; of the first column those of the first table."""
    found: dict[str, list[str]] = {}
    for table in itertools.chain.from_iterable(_tables(lines)):
        found.setdefault(table[0], table[1:])
    return found


def _tables(lines: list[str]) -> list[list[list[str]]]:
    tables: list[list[list[str]]] = []
    for line in lines:
        if line.startswith("┏"):
            tables.append([])
        if line.startswith(("┃", "│")):
            tables[-1].append([cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]])
    return [[list(column) for column in zip(*table, strict=True)] for table in tables]


@pytest.mark.parametrize("width", [60, 80, 120, 400])
def test_nothing_is_lost_or_wider_than_the_terminal(width: int) -> None:
    lines = printed(width)
    assert max(map(cell_len, lines)) <= width
    text = "".join(lines)
    for heading in ROWS[0]:
        assert heading in text
    found = cells(lines)
    assert "".join(found["data"][: len(found["data"]) // 2]) == PATH
    for number in NUMBERS:
        assert set(found[number]) - {""} == {ROWS[0][number]}  # numbers are whole
    assert len(_tables(lines)) == {60: 4, 80: 2, 120: 2, 400: 1}[width]
    assert all(table[0][0] == "model" for table in _tables(lines))


def test_paths_are_cut_between_folders() -> None:
    assert folded("/a/b/imagenet_validation_labels", 26) == ["/a/b/imagenet_validation_", "labels"]
    assert folded(PATH, 30) == ["/data/sets/", "imagenet_of_last_year/", "validation/", "with_corrected_labels"]


@given(st.text(st.sampled_from("ab /_-.é日"), max_size=60), st.integers(2, 20))
def test_folding_keeps_every_character_except_spaces_at_the_ends(text: str, width: int) -> None:
    lines = folded(text, width)
    assert all(cell_len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_pipes_get_one_line_a_row_and_no_colors() -> None:
    lines = printed(80, terminal=False, title="A [b] title", caption="A caption that is longer. " * 5)
    (header,) = [line for line in lines if line.startswith("┃")]
    assert "images/s" in header
    assert sum(line.startswith("│") for line in lines) == len(ROWS)
    assert all(PATH in line for line in lines if line.startswith("│"))
    assert "\x1b" not in "".join(lines)
    assert lines[0].startswith("A [b] title")
    assert lines[-1].startswith("A caption that is longer. A caption")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_real_pipe_and_a_real_terminal() -> None:
    import pty

    light = [sys.executable, "-c", "import sys, widefield_cli; sys.exit(widefield_cli.main())", "models"]
    settings = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    piped = subprocess.run(light, capture_output=True, text=True, env=settings, check=True).stdout
    assert "\x1b" not in piped
    assert all(len(line) < 200 for line in piped.splitlines())
    main, side = pty.openpty()
    with subprocess.Popen(light, stdout=side, env={**settings, "COLUMNS": "80", "TERM": "xterm-256color"}) as process:
        os.close(side)
        seen = b""
        while True:
            try:
                part = os.read(main, 65536)
            except OSError:  # Linux: the other side is closed
                break
            if not part:
                break
            seen += part
    assert process.returncode == 0
    assert b"\x1b[" in seen
    plain = [line for line in _without_colors(seen.decode()).splitlines() if line]
    assert max(map(len, plain)) <= 80
    names = [line.split("│")[1].strip() for line in piped.splitlines() if line.startswith("│")]
    assert {line.split("│")[1].strip() for line in plain if line.startswith("│")} - {""} == set(names)


def _without_colors(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_every_part_of_a_split_table_tells_its_rows_apart() -> None:
    rows = [
        {"model": "net", "stage": str(k), **{f"a long heading {i}": str(10 * k + i) for i in range(8)}}
        for k in range(3)
    ]
    tables = _tables(printed(60, rows=rows))
    assert len(tables) > 1
    assert all([table[0][0], table[1][0]] == ["model", "stage"] for table in tables)
    named = [{**row, "model": f"net {row['stage']}"} for row in rows]
    assert all(
        [column[0] for column in table[:2]] != ["model", "stage"] for table in _tables(printed(60, rows=named))[1:]
    )
