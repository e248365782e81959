"""``widefield report``."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "one page about one training run or several, with every analysis that applies"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run of `widefield train`")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (report.html in the run's folder)")
    parser.add_argument(
        "--count", type=int, default=32, metavar="N", help="number of analyzed images; evaluations use more (32)"
    )
    parser.add_argument("--device", default="cpu", help="where to compute (cpu)")
    parser.set_defaults(writes={"out": False})


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from rich.console import Console

    from widefield.runs import write_report

    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    page = write_report(args.runs, args.out, count=args.count, device=args.device, say=console.print)
    args.printer.add(page=page)
    print(f"wrote {page}")
    return 0
