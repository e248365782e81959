"""``widefield stability``."""

from __future__ import annotations

import argparse

from widefield.cli import _subjects

SUMMARY = "how much a model's outputs change when the image shifts"
COUNT = 32
"""Default number of images."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=COUNT)
    parser.add_argument(
        "--shifts", type=int, nargs="+", metavar="N",
        help="shifts in pixels (1 2 4 8 16 32, up to a seventh of --size); images exceed --size by the largest",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.analysis.stability import check_shifts

    analysis = _subjects.analysis(args)
    options = {"shifts": check_shifts(args.shifts)} if args.shifts else {}
    views = _subjects.views(args, analysis, **options)
    results = {view.name: analysis.run(view, progress=True, **options) for view in views}
    _subjects.write(results, args)
    return 0
