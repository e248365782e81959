"""``widefield erf``."""

from __future__ import annotations

import argparse

from widefield.cli import _subjects

SUMMARY = "effective receptive fields of models, next to the theoretical ones"
COUNT = 32
"""Default number of images."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=COUNT, sizes=True)
    parser.add_argument("--layer", metavar="NAME", help="layer to examine (default: the last one of the backbone)")
    parser.add_argument(
        "--position", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="unit on the layer's map (default: the center)"
    )
    _subjects.places(parser)
    parser.set_defaults(count=None)
    parser.add_argument("--linear", action="store_true", help="use a linear color scale instead of a logarithmic one")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    analysis = _subjects.analysis(args)
    several = len(args.size or ()) > 1
    if args.count is None:  # detections and key points of several images lie at different places
        args.count = COUNT if args.detection is None and args.keypoint is None else 1
    if args.of_class is not None and all(place is None for place in _places(args)):
        args.pixel = []
    options = {"layer": args.layer, "position": args.position or "center"}
    results = {}
    for view in _subjects.views(args, analysis):
        label = f"{view.name}, {view.shown.image_size} px" if several else view.name
        results[label] = analysis.run(view, progress=True, targets=_subjects.target(args, view), **options)
    _subjects.write(results, args, log=not args.linear)
    return 0


def _places(args: argparse.Namespace) -> list[object]:
    return [args.region, args.pixel, args.detection, args.box, args.keypoint]
