"""``widefield kernels``."""

from __future__ import annotations

import argparse
from typing import Any

from widefield.analysis.registry import ANALYSES
from widefield.cli import _subjects

ENTRY = ANALYSES["kernels"]
SUMMARY = ENTRY.summary


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.5, 0.9, 0.99], metavar="S",
        help="shares of the energy that crops must keep (0.5 0.9 0.99)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=int, metavar="K", help="report what cropping kernels larger than K x K pixels to K x K loses"
    )
    parser.add_argument(
        "--cost", action="store_true",
        help="crop the kernels to --limit, and report the change of outputs on images, of parameters and of MACs",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.cli._tables import print_table

    if args.cost and args.limit is None:
        raise ValueError("--cost is the cost of cropping to a limit: pass --limit K as well.")
    if not args.cost and (args.images is not None or args.size is not None):
        raise ValueError("images are used only for --cost: pass --cost and --limit K as well.")
    options: dict[str, Any] = {"shares": args.shares, "limit": args.limit}
    results = {}
    for word in args.models:
        found = _subjects.subject(word, args)
        view = found.view()
        about = {"weights": view.weights, "seed": args.seed}
        if args.cost:
            shown = found.view(_subjects.pictures(args, found), batch_size=args.batch_size)
            options["images"], about = _subjects.labeled_batches(shown), {**shown.about, **about}
        results[view.name] = ENTRY.run(view, about=about, **options)
    _subjects.write(results, args)
    if args.cost:
        print_table([result.cost_row() for result in results.values()])
    return 0
