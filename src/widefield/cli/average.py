"""``widefield average``."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "the mean of the weights of several runs, or of a run's last checkpoints, as one file"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="folders of runs from one starting point, or files of widefield"
    )
    parser.add_argument("--last", type=int, metavar="N", help="average the newest N checkpoints of the one run")
    parser.add_argument("--weights", choices=("ema", "model"), help="weights of runs (the average if they have one)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="where to write: NAME.safetensors, or a folder"
    )
    parser.set_defaults(writes={})


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.loading import save
    from widefield.runs import average
    from widefield.runs.averaging import has_batch_norms

    subject = average(args.sources, last=args.last, weights=args.weights)
    path = save(subject, args.out)
    args.printer.add(model=subject.name, written=path)
    if has_batch_norms(subject.model):
        print("the statistics of batch norms were averaged; runs.average(..., batches=...) measures them anew.")
    print(f"wrote {path}")
    return 0
