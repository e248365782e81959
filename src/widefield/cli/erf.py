"""``widefield erf``."""

from __future__ import annotations

import argparse

from widefield.cli import _subjects

SUMMARY = "effective receptive fields of models, beside the theoretical ones"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, sizes=True)
    parser.add_argument("--layer", metavar="NAME", help="whose map to look at (the last of the backbone)")
    parser.add_argument("--linear", action="store_true", help="colour the scores, not their logarithm")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.analysis import ReceptiveField, effective_receptive_field

    results: dict[str, ReceptiveField] = {}
    for word in args.models:
        found = _subjects.subject(word, args)
        for size in args.size or [found.size]:
            pictures = _subjects.pictures(args, found, size)
            name = found.name if len(args.size or ()) < 2 else f"{found.name}, {size} px"
            results[name] = effective_receptive_field(
                found.model,
                pictures.batches(args.batch),
                args.layer,
                batch=args.batch,
                name=found.name,
                about={**pictures.about, "weights": str(found.weights)},
                progress=True,
            )
    _subjects.write(results, args, log=not args.linear)
    return 0
