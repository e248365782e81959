"""``widefield blocks``."""

from __future__ import annotations

import argparse

from widefield.cli import _subjects

SUMMARY = "how much each residual block contributes: what changes when it is switched off"
COUNT = 256
"""Default number of images."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=COUNT)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    analysis = _subjects.analysis(args)
    results = {view.name: analysis.run(view, progress=True) for view in _subjects.views(args, analysis)}
    _subjects.write(results, args)
    return 0
