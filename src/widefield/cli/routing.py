"""``widefield routing``."""

from __future__ import annotations

import argparse

from widefield.cli import _subjects

SUMMARY = "which experts a mixture chooses, for which images"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=256)
    parser.add_argument(
        "--kind",
        default="pies",
        choices=("pies", "heat", "classes", "fields"),
        help="the figure's (pies); the page shows all",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.analysis.routing import routing_statistics

    results = {}
    for word in args.models:
        subject = _subjects.subject(word, args)
        pictures = _subjects.pictures(args, subject, stand_in=False)
        results[subject.name] = routing_statistics(
            subject.model,
            pictures.batches(args.batch),
            classes=pictures.classes or None,
            images=[pictures.name(i) for i in range(len(pictures))],
            name=subject.name,
            about={**pictures.about, "weights": str(subject.weights)},
            batch=args.batch,
            progress=True,
        )
    _subjects.write(results, args, kind=args.kind)
    return 0
