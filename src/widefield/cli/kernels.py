"""``widefield kernels``."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from widefield._files import write_whole
from widefield.cli import _subjects

if TYPE_CHECKING:
    from torch import Tensor, nn

    from widefield.surgery.trim_report import Trimming

SUMMARY = "energy of spatial kernels by radius, and how far they can be cropped"


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
    analysis = _subjects.analysis(args)
    if args.cost and args.limit is None:
        raise ValueError("--cost is the cost of cropping to a limit: pass --limit K as well.")
    if not args.cost and (args.images is not None or args.size is not None):
        raise ValueError("images are used only for --cost: pass --cost and --limit K as well.")
    results, costs = {}, {}
    for word in args.models:
        found = _subjects.subject(word, args)
        view = found.view()
        about = {"weights": view.weights, "seed": args.seed}
        results[view.name] = analysis.run(view, about=about, shares=args.shares, limit=args.limit)
        if args.cost:
            shown = found.view(_subjects.pictures(args, found), batch_size=args.batch_size)
            costs[view.name] = _trimmed(found.model, shown.labeled_batches(), args.limit)
    _subjects.write(results, args)
    if args.cost:
        args.printer.table([{"model": name, **cost.totals()} for name, cost in costs.items()])
        path = args.out / f"{args.command}-cost.json"
        write_whole(path, (json.dumps({name: cost.to_dict() for name, cost in costs.items()}) + "\n").encode())
        args.printer.add(costs={name: cost.to_dict() for name, cost in costs.items()}, costs_file=path)
        print(f"wrote {path}")
    return 0


def _trimmed(model: nn.Module, images: list[tuple[Tensor, ...]], limit: int) -> Trimming:
    """Return the report on cropping a model's kernels to the limit, whatever it costs."""
    from widefield.surgery import reparameterize, trim
    from widefield.surgery.walk import unmerged

    if unmerged(model):
        model = reparameterize(model, images[0][0][:2])
    reports: list[Trimming] = []
    trim(model.eval(), 0.0, loader=images, limit=limit, report=reports.append)
    return reports[0]
