"""``widefield stability``."""

from __future__ import annotations

import argparse

from widefield.cli import _subjects

SUMMARY = "how much outputs change when images shift"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser)
    parser.add_argument(
        "--shifts", type=int, nargs="+", metavar="N", help="in pixels (1 2 4 8 16 32); images are larger by the largest"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.analysis.stability import SHIFTS, check_shifts, translation_stability

    shifts = check_shifts(args.shifts or SHIFTS)
    results = {}
    for word in args.models:
        found = _subjects.subject(word, args)
        pictures = _subjects.pictures(args, found, (args.size or found.size) + shifts[-1])
        results[found.name] = translation_stability(
            found.model,
            pictures.batches(args.batch),
            shifts=shifts,
            batch=args.batch,
            name=found.name,
            about={**pictures.about, "weights": str(found.weights)},
            progress=True,
        )
    _subjects.write(results, args)
    return 0
