"""``widefield kernels``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from widefield.cli import _subjects

if TYPE_CHECKING:
    from widefield.subjects import Subject

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
        about: dict[str, Any] = {"weights": found.weights, "seed": args.seed}
        images = None
        if args.cost:
            images, shown = _images(found, args)
            about = {**shown, **about}
        results[found.name] = kernel_energy(
            found.model, shares=args.shares, limit=args.limit, images=images, name=found.name, about=about
        )
    _subjects.write(results, args)
    if args.cost:
        print_table([result.cost_row() for result in results.values()])
    return 0


def _images(found: Subject, args: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Return batches, and facts about them. Labels are known to be the model's where both are those of one run."""
    pictures = _subjects.pictures(args, found)
    own = args.images is None and bool(pictures.classes)
    return [batch if own else batch["image"] for batch in pictures.batches(args.batch)], pictures.about
