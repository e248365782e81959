"""``widefield interactions``."""

from __future__ import annotations

import argparse

from widefield.cli import _subjects

SUMMARY = "multi-order interactions: how large the contexts are that a model uses"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=8)
    parser.add_argument("--grid", type=int, default=16, metavar="N", help="patches a side (16)")
    parser.add_argument("--pairs", type=int, default=8, metavar="N", help="pairs of patches an image (8)")
    parser.add_argument("--contexts", type=int, default=16, metavar="N", help="contexts a pair and order (16)")
    parser.add_argument(
        "--orders", type=float, nargs="+", metavar="S",
        help="sizes of the contexts, as shares of the other patches (0 0.05 0.1 0.25 0.5 0.75 0.9 0.95 1)",
    )  # fmt: skip
    parser.add_argument("--reach", type=int, default=2, metavar="N", help="patches of a pair are so far apart (2)")
    parser.add_argument(
        "--baseline", choices=("zero", "mean"), default="zero",
        help="what hidden patches become: the data set's mean colour, or the image's (zero)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    import sys

    from widefield.analysis.interactions import ORDERS, forward_passes, interactions

    sampling = {
        "grid": args.grid,
        "pairs": args.pairs,
        "contexts": args.contexts,
        "orders": args.orders or ORDERS,
        "reach": args.reach,
    }
    results = {}
    for word in args.models:
        found = _subjects.subject(word, args)
        pictures = _subjects.pictures(args, found)
        passes = forward_passes(len(pictures), **sampling)
        print(f"{found.name}: {passes:,} forward passes at {pictures.image_size} pixels", file=sys.stderr)
        # A run's own images come with the classes that the model was trained on; others only with its own opinion.
        own = pictures.classes and args.images is None
        results[found.name] = interactions(
            found.model,
            pictures.tensor(),
            targets=[pictures.sample(index)["label"] for index in range(len(pictures))] if own else None,
            **sampling,
            baseline=args.baseline,
            seed=args.seed,
            name=found.name,
            about={**pictures.about, "weights": str(found.weights)},
            batch=args.batch,
            progress=True,
        )
    _subjects.write(results, args)
    return 0
