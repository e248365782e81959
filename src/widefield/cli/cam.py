"""``widefield cam``."""

from __future__ import annotations

import argparse

from widefield.cli import _subjects

SUMMARY = "class activation maps of models, side by side"
COUNT = 4
"""Default number of images."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=COUNT)
    parser.add_argument(
        "--layer", metavar="NAME", help="layer to examine in all models (default: the last one the class depends on)"
    )
    _subjects.places(parser, "--target")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    analysis = _subjects.analysis(args)
    results = {}
    for view in _subjects.views(args, analysis):
        chosen = _subjects.target(args, view)
        results[view.name] = analysis.run(view, progress=True, targets=chosen, layer=args.layer)
    _subjects.write(results, args, count=args.count)
    return 0
