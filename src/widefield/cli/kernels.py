"""``widefield kernels``."""

from __future__ import annotations

import argparse
from typing import Any

from widefield.cli import _subjects

SUMMARY = "energy of spatial kernels by radius, and how far they can be cropped"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.5, 0.9, 0.99], metavar="S",
        help="of the energy that crops are to keep (0.5 0.9 0.99)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=int, metavar="K", help="say what cropping kernels beyond K x K pixels to it would lose"
    )
    parser.add_argument(
        "--cost", action="store_true",
        help="crop them to --limit, and say what that does to the outputs on images, to parameters and work",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.analysis.kernels import kernel_energy
    from widefield.cli._tables import print_table

    if args.cost and args.limit is None:
        raise ValueError("--cost is that of cropping to a limit: pass --limit K, too.")
    if not args.cost and (args.images is not None or args.size is not None):
        raise ValueError("images are looked at for --cost alone: pass --cost and --limit K, too.")
    results = {}
    for word in args.models:
        found = _subjects.subject(word, args)
        about: dict[str, Any] = {"weights": str(found.weights), "seed": args.seed}
        images = None
        if args.cost:
            pictures = _subjects.pictures(args, found)
            images, about = _subjects.batches(args, found, pictures), {**pictures.about, **about}
        results[found.name] = kernel_energy(
            found.model, shares=args.shares, limit=args.limit, images=images, name=found.name, about=about
        )
    _subjects.write(results, args)
    if args.cost:
        print_table([result.cost_row() for result in results.values()])
    return 0
