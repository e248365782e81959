"""``widefield object-erf``."""

from __future__ import annotations

import argparse

from widefield.analysis.registry import ANALYSES
from widefield.cli import _subjects

ENTRY = ANALYSES["object-erf"]
SUMMARY = ENTRY.summary


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=None)
    parser.add_argument(
        "--count", type=int, default=ENTRY.count, metavar="N", help=f"images of the run's data ({ENTRY.count})"
    )
    parser.add_argument("--objects", type=int, default=24, metavar="N", help="objects of each size (24)")
    parser.add_argument(
        "--sizes",
        type=float,
        nargs="*",
        default=[32, 96],
        metavar="PIXELS",
        help="edges between the sizes: square roots of the boxes' areas, in pixels of the model's images (32 96)",
    )
    parser.add_argument(
        "--unit",
        choices=("score", "center"),
        default="score",
        help="the class logit of the object's box, or the neck's unit in its middle, which leaves the head out (score)",
    )
    parser.add_argument(
        "--extent", type=float, default=3, metavar="X", help="boxes from the middle to the border of a field (3)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    options = {"sizes": args.sizes, "count": args.objects, "unit": args.unit, "extent": args.extent}
    results = {view.name: ENTRY.run(view, progress=True, **options) for view in _subjects.views(args, ENTRY)}
    _subjects.write(results, args)
    return 0
