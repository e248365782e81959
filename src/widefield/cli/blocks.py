"""``widefield blocks``."""

from __future__ import annotations

import argparse

from widefield.analysis.registry import ANALYSES
from widefield.cli import _subjects

ENTRY = ANALYSES["blocks"]
SUMMARY = ENTRY.summary


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=ENTRY.count)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    results = {view.name: ENTRY.run(view, progress=True) for view in _subjects.views(args, ENTRY)}
    _subjects.write(results, args)
    return 0
