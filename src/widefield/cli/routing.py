"""``widefield routing``."""

from __future__ import annotations

import argparse

from widefield.cli import _subjects

SUMMARY = "which experts a mixture chooses for which images"
COUNT = 256
"""Default number of images."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=COUNT)
    parser.add_argument(
        "--kind",
        default="choices",
        choices=("choices", "heat", "classes", "fields"),
        help="figure to draw (choices); the HTML page shows all of them",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    analysis = _subjects.analysis(args)
    results = {view.name: analysis.run(view, progress=True) for view in _subjects.views(args, analysis)}
    _subjects.write(results, args, kind=args.kind)
    return 0
