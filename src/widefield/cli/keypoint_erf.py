"""``widefield keypoint-erf``."""

from __future__ import annotations

import argparse

from widefield.cli import _subjects

SUMMARY = "effective receptive fields of a pose model's key points, by the size of people"
COUNT = 64
"""Default number of images."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=None)
    parser.add_argument("--count", type=int, default=COUNT, metavar="N", help=f"crops of the run's data ({COUNT})")
    parser.add_argument(
        "--keypoint", nargs="+", metavar="NAME", help="names or indices of the key points to measure (all)"
    )
    parser.add_argument("--people", type=int, default=24, metavar="N", help="people of each size (24)")
    parser.add_argument(
        "--sizes",
        type=float,
        nargs="*",
        default=[32, 96],
        metavar="PIXELS",
        help="edges between the sizes of people: square roots of their areas, in pixels of the files (32 96)",
    )
    parser.add_argument(
        "--extent", type=float, default=0.75, metavar="X",
        help="sides of the person's box from the key point to the border of a field (0.75)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    analysis = _subjects.analysis(args)
    options = {"sizes": args.sizes, "count": args.people, "extent": args.extent}
    results = {}
    for view in _subjects.views(args, analysis):
        chosen = None if args.keypoint is None else [_subjects.keypoint(word, view) for word in args.keypoint]
        results[view.name] = analysis.run(view, progress=True, keypoints=chosen, **options)
    _subjects.write(results, args)
    return 0
