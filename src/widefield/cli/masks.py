"""``widefield masks``."""

from __future__ import annotations

import argparse

from widefield.cli import _subjects

SUMMARY = "learned masks of GMConv layers, and how far they extend at each depth"
COUNT = 32
"""Default number of images."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=COUNT)
    parser.add_argument(
        "--convert", action="store_true", help="convert models without masks to GMConv, untrained, before the analysis"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.surgery import GMConv, convert

    analysis = _subjects.analysis(args)
    results = {}
    for word in args.models:
        found = _subjects.subject(word, args)
        untrained = args.convert and not analysis.applies(found.model)
        if untrained:
            convert(found.model, GMConv(), inplace=True)
        for view in _subjects.views_of(found, args, analysis):
            about = {**view.about, **({"masks": "untrained"} if untrained else {})}
            results[view.name] = analysis.run(view, about=about, progress=True)
    _subjects.write(results, args)
    return 0
