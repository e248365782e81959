"""Measure the work around dense networks: NMS, assignment, RoIAlign, masks, windows, metrics, key points.

python benchmarks/dense.py [--parts suppression masks] [--repeats 9] [--budget 4] [--out DIR] [--suffix before]

Ours and the peer take turns on the same inputs (`dense_cases.py`). Times are those of the processor on one thread, so
other programs may run meanwhile; ratios are medians over rounds. Memory is the largest sum of tensors that a call holds
at a time, as torch.profiler counts them; NumPy's arrays are not in it.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dense_cases import PARTS, Call, Case
from peers import peak_bytes

from widefield import report
from widefield.benchmarks.record import Bar, bar, publish
from widefield.benchmarks.settings import keep_freed_memory

SHORTEST_S = 5e-3
"""Shorter calls are repeated within a timing."""
LEAST = 3
"""Timings of each call at least."""


def seconds_of(call: Call, count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count


def measure(calls: dict[str, Call], repeats: int, budget_s: float) -> dict[str, list[float]]:
    """Return seconds of CPU time of a call, one for each round, in turns; slow calls get fewer rounds."""
    first = {name: min(seconds_of(call, 1) for _ in range(2)) for name, call in calls.items()}
    counts = {name: max(1, round(SHORTEST_S / max(spent, 1e-6))) for name, spent in first.items()}
    round_s = sum(counts[name] * spent for name, spent in first.items())
    rounds = max(LEAST, min(repeats, int(budget_s / max(round_s, 1e-6))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            found[name].append(seconds_of(calls[name], counts[name]))
    return found


def row_of(part: str, case: Case, repeats: int, budget_s: float) -> dict[str, Any]:
    """Return the figures of one case."""
    name, ours, peer, theirs = case
    calls = {"ours": ours} if theirs is None else {"ours": ours, "peer": theirs}
    with torch.inference_mode():
        found = measure(calls, repeats, budget_s)
        memory = {key: peak_bytes(call) for key, call in calls.items()}
    row: dict[str, Any] = {"part": part, "call": name, "ms": 1e3 * statistics.median(found["ours"])}
    row["rounds"], row["MiB"] = len(found["ours"]), memory["ours"] / 2**20
    if theirs is not None:
        ratios = torch.tensor([b / a for a, b in zip(found["ours"], found["peer"], strict=True)]).double()
        row |= {"peer": peer, "peer ms": 1e3 * statistics.median(found["peer"]), "peer MiB": memory["peer"] / 2**20}
        row["peer / ours"] = float(ratios.median())
        row["peer / ours, p20-p80"] = ratios.quantile(torch.tensor([0.2, 0.8]).double()).tolist()
    return row


def bars_of(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """Return the bar; calls of microseconds do not count."""
    long = [{**row, "label": row["call"]} for row in rows if "peer ms" in row and row["ms"] > 1]
    return [bar("calls of over 1 ms, peer's time / ours", long, lambda row: float(row["peer / ours"]), at_least=0.95)]


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Return a row as text."""
    known = "peer ms" in row
    low, high = row.get("peer / ours, p20-p80", (0, 0))
    return {
        "call": row["call"],
        "ms": f"{row['ms']:.3g}",
        "MiB": f"{row['MiB']:.1f}",
        "peer": row.get("peer", "-"),
        "peer's ms": f"{row['peer ms']:.3g}" if known else "-",
        "peer's MiB": f"{row['peer MiB']:.1f}" if known else "-",
        "peer / ours (p20-p80)": f"{row['peer / ours']:.2f} ({low:.2f}-{high:.2f})" if known else "-",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for the timings of a case")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--suffix", default="", help="added to the names of the files, such as 'before'")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # pycocotools with NumPy 2
    torch.manual_seed(0)
    rows = []
    for part in args.parts:
        for case in PARTS[part]():
            rows.append(row_of(part, case, args.repeats, args.budget))
            print(" | ".join(shown(rows[-1]).values()), flush=True)
    table = report.markdown([shown(row) for row in rows])
    command = shlex.join(["python", "benchmarks/dense.py", *(_given(sys.argv[1:]))])
    name = "_".join(filter(None, ("dense_cpu", args.suffix)))
    text = f"CPU time on one thread, in milliseconds of a call; a ratio above 1 means that ours is faster.\n\n{table}"
    beside = ("torchvision", "torchmetrics", "pycocotools")
    publish(args.out / name, command, {"rows": rows}, text, bars=bars_of(rows), beside=beside)


def _given(arguments: list[str]) -> list[str]:
    """Return the arguments without the folder of the results."""
    place = arguments.index("--out") if "--out" in arguments else len(arguments)
    return arguments[:place] + arguments[place + 2 :]


if __name__ == "__main__":
    main()
