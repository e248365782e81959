"""``widefield kernels``."""

from __future__ import annotations

import argparse

from widefield.cli import _subjects

SUMMARY = "energy of spatial kernels by radius, and how far they can be cropped"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=None)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.5, 0.9, 0.99], metavar="S",
        help="of the energy that crops are to keep (0.5 0.9 0.99)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=int, metavar="K", help="say what cropping kernels beyond K x K pixels to it would lose"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.analysis.kernels import kernel_energy

    results = {}
    for word in args.models:
        found = _subjects.subject(word, args)
        about = {"weights": found.weights, "seed": args.seed}
        results[found.name] = kernel_energy(
            found.model, shares=args.shares, limit=args.limit, name=found.name, about=about
        )
    _subjects.write(results, args)
    return 0
