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
    _subjects.places(parser, "--target")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    results = {}
    for view in _subjects.views(args, ENTRY):
        chosen = _subjects.target(args, view)
        results[view.name] = ENTRY.run(view, progress=True, targets=chosen, layer=args.layer)
    _subjects.write(results, args, count=args.count)
    return 0
