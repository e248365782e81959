"""Measure whole networks: inference and training step, ours against everything else that runs them on this CPU.

python benchmarks/whole_models.py [--models ConvNeXt-T ...] [--parts inference ...] [--out benchmarks/results]

- Eager PyTorch in NCHW and channels_last: the stock network against ours (benchmarks/whole_networks.py says what they
  are), in turns in one process. The better layout counts, on both sides.
- torch.compile of both, and our network's file in onnxruntime and OpenVINO: in turns with ours, each in a process of
  its own. A network that does not compile, or is not exported, is a row that says so.
- Memory: the peak resident memory of calls in a fresh process, minus what was resident before the network was built.

CPU time on one thread. Ratios are medians over rounds, of their time over ours. Needs openvino, a C++ compiler, and
segmentation-models-pytorch. Rows are written as they are measured; rows of networks that are not chosen stay as they
are. All networks together take about 35 minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import whole_children as children
from whole_networks import MODES, NETWORKS, OURS

from widefield import _checks, report
from widefield.benchmarks.record import Bar, bar, publish
from widefield.benchmarks.settings import LAYOUTS

Row = dict[str, Any]

LEAST = 0.95
"""Speed that ours must have, compared with the best eager peer."""
MOST_MEMORY = 1.1
"""Memory that ours may need, compared with the stock network in the better layout."""
OTHERS = ("torch.compile, stock", "torch.compile, ours", "onnxruntime", "OpenVINO")
SIDES = ("stock", OURS)
PARTS = (*MODES, *OTHERS)
SUFFIXES = {"onnxruntime": ".onnx", "OpenVINO": ".xml"}
NAME = "whole_models_cpu"


@dataclass(frozen=True)
class Limits:
    """Seconds of the rounds of a measurement, and after which a part and a compilation are given up."""

    budget_s: float
    part_s: float
    compile_s: float


def best(seconds: Mapping[str, list[float]], ours: bool) -> str:
    """Return the "NETWORK, LAYOUT" with the lowest median, among ours or among the stock ones."""
    found = [name for name in seconds if (name.partition(", ")[0] == OURS) is ours]
    return min(found, key=lambda name: statistics.median(seconds[name]))


def compared(seconds: Mapping[str, list[float]]) -> Row:
    """Return the best stock network and ours of a mode, their times in milliseconds, and the ratio."""
    stock, mine = best(seconds, False), best(seconds, True)
    return {
        "stock": stock,
        OURS: mine,
        "ratio": children.ratio(seconds[stock], seconds[mine]),
        "ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "rounds": {name: len(values) for name, values in seconds.items()},
    }


def measured(index: int, part: str, limits: Limits, old: Row | None, folder: str) -> Row:
    """Measure one of PARTS and return the row of its network; the other parts stay as they are in the old row."""
    network, start = NETWORKS[index], time.perf_counter()
    row: Row = {**(old or {}), "label": network.title, "batch": network.batch, "size": network.size}
    try:
        found = (measured_eager if part in MODES else measured_other)(part, index, row, limits, folder)
    except children.FailedError as error:
        found = {"missing": str(error)}
    found |= {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"), "commit": commit()}
    return {**row, part: found | {"took_s": time.perf_counter() - start}}


def measured_eager(mode: str, index: int, row: Row, limits: Limits, folder: str) -> Row:
    """Return times and memory of stock and ours in a mode."""
    found = children.in_child(children.eager, index, mode, limits.budget_s, timeout_s=limits.part_s)
    found |= compared(found["seconds"])
    found["memory"] = {}
    for side in SIDES:
        name, layout = found[side].split(", ")
        found["memory"][side] = children.in_child(children.memory, index, mode, name, layout, timeout_s=limits.part_s)
    return dict(found)


def measured_other(other: str, index: int, row: Row, limits: Limits, folder: str) -> Row:
    """Return memory and times of one of OTHERS, against ours in the layout that was the better one."""
    inference = row.get(MODES[0], {})
    if OURS not in inference:
        raise children.FailedError("compared with ours in inference, which was not measured")
    (stock, stock_layout), (_, layout) = (inference[side].split(", ") for side in SIDES)
    if other in SUFFIXES:
        path = f"{folder}/model{SUFFIXES[other]}"
        children.in_child(children.exported, index, path, timeout_s=limits.part_s)
        words: tuple[Any, ...] = children.loaded, index, path, layout, limits.budget_s
    else:
        which = (OURS, layout) if other.endswith(OURS) else (stock, stock_layout)
        words = children.compiled, index, *which, layout, limits.budget_s, limits.compile_s
    return dict(children.in_child(*words, timeout_s=limits.part_s))


def commit() -> str:
    """Return the commit of the checkout, "" outside of one."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip()


def merged(old: Iterable[Row], row: Row) -> list[Row]:
    """Return all rows with a new one in its place, in the order of NETWORKS."""
    rows = {r["label"]: r for r in old} | {row["label"]: row}
    return [rows[network.title] for network in NETWORKS if network.title in rows]


def has(row: Row, part: str) -> bool:
    """Return whether a part of a row was measured."""
    return part in row and "missing" not in row[part]


def bars_of(rows: Iterable[Row]) -> list[Bar]:
    """Return the bars; each is judged by its worst row."""
    bars = []
    for mode, title in zip(MODES, ("inference", "training step"), strict=True):
        found = [row | row[mode] for row in rows if has(row, mode)]
        bars += [
            bar(f"best eager peer's time / ours, {title}", found, lambda r: float(r["ratio"]), at_least=LEAST),
            bar(f"our memory / that peer's, {title}", found, _memory, at_most=MOST_MEMORY),
        ]
    return bars


def _memory(row: Row) -> float:
    return float(row["memory"][OURS] / row["memory"]["stock"])


def speeds(row: Row) -> dict[str, str]:
    """Return a row of the table of times: how many times as fast ours is as each."""
    cells = {"network": row["label"], "images": f"{row['batch']} x {row['size']}x{row['size']}"}
    for mode, title in zip(MODES, ("", "step: "), strict=True):
        found = row[mode] if has(row, mode) else None
        cells[f"{title}ours, ms"] = _ms(found["ms"][found[OURS]]) if found else "-"
        cells[f"{title}eager"] = f"{found['ratio']:.2f} ({found['stock'].partition(', ')[0]})" if found else "-"
    return cells | {other: _versus(row, other) for other in OTHERS}


def _versus(row: Row, other: str) -> str:
    if has(row, other):
        return f"{row[other]['ratio']:.2f}"
    return "failed" if other in row else "not run"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def memories(row: Row) -> dict[str, str]:
    """Return a row of the table of memory in MiB."""
    cells = {"network": row["label"]}
    for mode, title in zip(MODES, ("", "step: "), strict=True):
        for side in SIDES:
            cells[f"{title}{side}"] = _mib(row[mode]["memory"][side]) if has(row, mode) else "-"
        if mode == MODES[0]:
            cells |= {other: _mib(row[other]["memory"]) if has(row, other) else "-" for other in OTHERS}
    return cells


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f}"


def layouts(row: Row) -> list[dict[str, str]]:
    """Return the eager times of a network in both layouts, a row for each mode and network."""
    found = []
    for mode in filter(lambda mode: has(row, mode), MODES):
        times = {
            name: _ms(ms) + ("" if row[mode]["rounds"][name] > 1 else " (one call)")
            for name, ms in row[mode]["ms"].items()
        }
        for name in dict.fromkeys(name.partition(", ")[0] for name in times):
            shown = {layout: times[f"{name}, {layout}"] for layout in LAYOUTS}
            found.append({"network": row["label"], "mode": mode, "": name, **shown})
    return found


def reasons(rows: Iterable[Row]) -> str:
    """Return why measurements are missing, as a list."""
    missing = [(row, part) for row in rows for part in PARTS if "missing" in row.get(part, {})]
    return "\n".join(f"- {row['label']}, {part}: {row[part]['missing']}" for row, part in missing)


def when(rows: Iterable[Row]) -> str:
    """Return when, at which commits and in how many minutes the parts of all rows were measured."""
    found = [row[part] for row in rows for part in PARTS if part in row]
    dates = sorted(part["date"] for part in found)
    commits = ", ".join(sorted({part["commit"] or "unknown" for part in found}))
    took = sum(part["took_s"] for part in found) / 60
    spread = f"From {dates[0]} to {dates[-1]} UTC" if found else "Nothing yet"
    return f"{spread}, {took:.0f} minutes in all, at {commits}; --models and --parts measure single rows and columns."


def text_of(rows: list[Row]) -> str:
    """Return the Markdown of a run."""
    parts = [
        "CPU time on one thread; medians over rounds in turns. Ratios are the other's time over ours: above 1 ours is "
        f"faster. {when(rows)}",
        "<!-- --8<-- [start:speed] -->",
        report.markdown([speeds(row) for row in rows]).rstrip(),
        "<!-- --8<-- [end:speed] -->",
        *(["Not measured:", reasons(rows)] if reasons(rows) else []),
        "Peak resident memory in MiB, without what was resident before the network was built. torch.compile's includes "
        "what the compiler leaves in the process.",
        "<!-- --8<-- [start:memory] -->",
        report.markdown([memories(row) for row in rows]).rstrip(),
        "<!-- --8<-- [end:memory] -->",
        "Eager times in both layouts, in milliseconds. A layout that is much slower than the other got one call.",
        report.markdown([line for row in rows for line in layouts(row)]).rstrip(),
    ]
    return "\n\n".join(parts) + "\n"


def read(path: Path) -> list[Row]:
    """Return the rows of an earlier run, none if there is no file."""
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    titles = [network.title for network in NETWORKS]
    parser.add_argument("--models", nargs="+", default=titles, help="networks to measure; default: all")
    parser.add_argument("--parts", nargs="+", default=PARTS, help=f"what to measure of {PARTS}; default: all")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of the rounds of a measurement")
    parser.add_argument("--part-limit", type=float, default=1200.0, help="seconds after which a part is given up")
    parser.add_argument("--compile-limit", type=float, default=180.0, help="CPU seconds of one torch.compile")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    chosen = [_checks.choice("every entry of --models", title, titles) for title in args.models]
    asked = [_checks.choice("every entry of --parts", part, PARTS) for part in args.parts]
    parts = [part for part in PARTS if part in asked]
    limits = Limits(args.budget, args.part_limit, args.compile_limit)
    torch.set_num_threads(1)
    command = f"python benchmarks/whole_models.py --budget {args.budget:g}"
    rows = read(args.out / f"{NAME}.json")
    for index, title in enumerate(titles):
        if title not in chosen:
            continue
        print(title, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for part in parts:
                old = next((row for row in rows if row["label"] == title), None)
                rows = merged(rows, measured(index, part, limits, old, folder))
                write(args.out, command, rows)
                print("  " + said(rows, title, part), flush=True)
    for each in bars_of(rows):
        print(" | ".join(each.formatted().values()))


def said(rows: Iterable[Row], title: str, part: str) -> str:
    """Return a line about a part that was measured."""
    found = next(row[part] for row in rows if row["label"] == title)
    if "missing" in found:
        return f"{part}: {found['missing']}"
    peers = f" ({found['stock']} / {found[OURS]})" if part in MODES else ""
    return f"{part}: {found['ratio']:.3f} times ours{peers}"


def write(folder: Path, command: str, rows: list[Row]) -> None:
    """Write all rows."""
    beside = ("onnxruntime", "openvino", "segmentation-models-pytorch")
    publish(folder / NAME, command, {"rows": rows}, text_of(rows), bars=bars_of(rows), beside=beside)


if __name__ == "__main__":
    main()
