"""``widefield object-erf``."""

from __future__ import annotations

import argparse

from widefield.cli import _subjects

SUMMARY = "effective receptive fields of a detector's objects, by their size"
COUNT = 64
"""Default number of images."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=None)
    parser.add_argument("--count", type=int, default=COUNT, metavar="N", help=f"images of the run's data ({COUNT})")
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
    analysis = _subjects.analysis(args)
    options = {"sizes": args.sizes, "count": args.objects, "unit": args.unit, "extent": args.extent}
    results = {view.name: analysis.run(view, progress=True, **options) for view in _subjects.views(args, analysis)}
    _subjects.write(results, args)
    return 0
