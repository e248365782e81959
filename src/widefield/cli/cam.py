"""``widefield cam``."""

from __future__ import annotations

import argparse

from widefield.analysis.registry import ANALYSES
from widefield.cli import _subjects

ENTRY = ANALYSES["cam"]
SUMMARY = ENTRY.summary


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=ENTRY.count)
    parser.add_argument(
        "--layer", metavar="NAME", help="layer to examine in all models (default: the last one the class depends on)"
    )
    parser.add_argument(
        "--target", type=int, metavar="N", help="index of a class (default: each image's predicted class)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    options = {"targets": args.target, "layer": args.layer}
    results = {view.name: ENTRY.run(view, progress=True, **options) for view in _subjects.views(args, ENTRY)}
    _subjects.write(results, args, count=args.count)
    return 0
