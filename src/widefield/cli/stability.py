"""``widefield stability``."""

from __future__ import annotations

import argparse

from widefield.analysis.registry import ANALYSES
from widefield.cli import _subjects

ENTRY = ANALYSES["stability"]
SUMMARY = ENTRY.summary


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=ENTRY.count)
    parser.add_argument(
        "--shifts", type=int, nargs="+", metavar="N",
        help="shifts in pixels (1 2 4 8 16 32); images are larger than --size by the largest shift",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.analysis.stability import SHIFTS, check_shifts

    options = {"shifts": check_shifts(args.shifts or SHIFTS)}
    views = _subjects.views(args, ENTRY, **options)
    results = {view.name: ENTRY.run(view, progress=True, **options) for view in views}
    _subjects.write(results, args)
    return 0
