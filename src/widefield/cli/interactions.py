"""``widefield interactions``."""

from __future__ import annotations

import argparse
import sys

from widefield.cli import _subjects

SUMMARY = "multi-order interactions: how large the contexts are that a model uses"
COUNT = 8
"""Default number of images."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=COUNT)
    parser.add_argument("--grid", type=int, default=16, metavar="N", help="patches along each side (16)")
    parser.add_argument("--pairs", type=int, default=8, metavar="N", help="pairs of patches per image (8)")
    parser.add_argument("--contexts", type=int, default=16, metavar="N", help="contexts per pair and order (16)")
    parser.add_argument(
        "--orders", type=float, nargs="+", metavar="S",
        help="sizes of the contexts, as shares of the other patches (0 0.05 0.1 0.25 0.5 0.75 0.9 0.95 1)",
    )  # fmt: skip
    parser.add_argument(
        "--reach", type=int, default=2, metavar="N", help="largest distance between the patches of a pair (2)"
    )
    parser.add_argument(
        "--baseline", choices=("zero", "mean"), default="zero",
        help="color of hidden patches: the data set's mean (zero) or the image's mean (mean); default: zero",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.analysis.interactions import ORDERS, forward_passes

    analysis = _subjects.analysis(args)
    sampling = {
        "grid": args.grid,
        "pairs": args.pairs,
        "contexts": args.contexts,
        "orders": args.orders or ORDERS,
        "reach": args.reach,
    }
    results = {}
    for view in _subjects.views(args, analysis):
        passes = forward_passes(len(view.shown), **sampling)
        print(f"{view.name}: {passes:,} forward passes at {view.shown.image_size} pixels", file=sys.stderr)
        results[view.name] = analysis.run(view, progress=True, **sampling, baseline=args.baseline, seed=args.seed)
    _subjects.write(results, args)
    return 0
