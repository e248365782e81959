"""``widefield runs``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SUMMARY = "list runs, compare their recipes and metrics, draw their curves"

_DRAWINGS = (".png", ".pdf", ".svg")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="runs, or folders of them (runs)")
    parser.add_argument(
        "--where", nargs="+", default=[], metavar="KEY=GLOB", help="filter: state=finished model.name='morf_*'"
    )
    parser.add_argument(
        "--sort", metavar="KEY", help="name, model, data, state, trained, time, updated, best, or a metric (updated)"
    )
    parser.add_argument("--metric", nargs="+", metavar="NAME", help="metrics to show or draw (each run's own headline)")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="RUN", help="show the keys and metrics in which these runs differ"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw metrics over epochs or steps: .png, .pdf or .svg"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write recipes and logs of the runs as JSON")
    parser.set_defaults(writes={"out": False, "plot": False}, needs_models=False)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield import _checks, report, runs

    if args.plot:
        _checks.choice("the suffix of --plot", args.plot.suffix, _DRAWINGS)
    folders = args.folders or ["runs"]
    # Runs to compare may be given by their folders, outside of runs/.
    nowhere = args.compare and not args.folders and not Path("runs").is_dir()
    found = runs.filter_runs([] if nowhere else runs.find_runs(*folders), args.where)
    if args.sort:
        found = runs.sort_runs(found, args.sort)
    if args.compare:
        found = runs.pick_runs(found, args.compare)
        args.printer.table(runs.comparison(found, args.metric or ()))
    elif found:
        args.printer.table([record.row(metric) for metric in args.metric or [None] for record in found], right=_NUMBERS)
        for record in found:
            if record.problem:
                print(f"{record.name}: {record.problem}")
    else:
        print(f"no runs in {', '.join(folders)}{' that meet ' + ' '.join(args.where) if args.where else ''}.")
    args.printer.add(runs=[record.to_dict() for record in found])
    if args.plot:
        drawing = report.drawing(runs.draw_runs(found, args.metric or ()), args.plot.suffix[1:])
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        args.plot.write_bytes(drawing)
        print(f"wrote {args.plot}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps([record.to_dict() for record in found], indent=2, allow_nan=False) + "\n")
        print(f"wrote {args.out}")
    return 0


_NUMBERS = ("trained", "best", "last", "train loss", "time")
