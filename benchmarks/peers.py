"""What the comparisons with another library's model share: peak memory of a call, rows of a table, bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile

from widefield import bench
from widefield.benchmarks.record import Bar, Row, bar
from widefield.benchmarks.settings import LAYOUTS


def peak_bytes(run: Callable[[], None]) -> int:
    """Return the largest sum of the tensors that a call holds at a time, beyond those that exist before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def rows_of(
    peer: str,
    mode: str,
    measured: Mapping[str, bench.Row],
    memory: Mapping[str, int],
    facts: Mapping[str, Mapping[str, Any]],
) -> list[Row]:
    """Return a row for each model and layout, with its ratios to the peer.

    Args:
        peer: name of the other library's model.
        mode: what was measured, such as "inference".
        measured: times of "MODEL, LAYOUT".
        memory: peak memory of the same, in bytes.
        facts: further entries of each model's rows.
    """
    best = min(measured[f"{peer}, {layout}"].p50 for layout in LAYOUTS)
    rows = []
    for key, row in measured.items():
        name, layout = key.split(", ")
        same = f"{peer}, {layout}"
        rows.append(
            {
                "label": f"{mode}, {key}",
                "model": name,
                **facts[name],
                "mode": mode,
                "layout": layout,
                "time": row.to_dict(),
                "same_layout": measured[same].p50 / row.p50,
                "better_layout": best / row.p50,
                "peak_bytes": memory[key],
                "memory": memory[same] / memory[key],
            }
        )
    return rows


def bars_of(rows: Sequence[Row], peer: str) -> list[Bar]:
    """Return the bars: no slower and no larger than the peer in the same layout."""
    ours = [row for row in rows if row["model"] == "widefield"]
    return [
        bar(f"{peer}'s time / ours, same layout", ours, lambda row: float(row["same_layout"]), at_least=1),
        bar(f"{peer}'s memory / ours, same layout", ours, lambda row: float(row["memory"]), at_least=1),
    ]


def digest_of(rows: Sequence[Row], peer: str) -> list[tuple[str, list[dict[str, str]]]]:
    """Return the ratios in a small table, for the head of the file."""
    lines = [
        {
            "": f"{row['mode']}, {row['layout']}",
            f"time, {peer}'s / ours": f"{row['same_layout']:.2f}",
            f"peak memory, {peer}'s / ours": f"{row['memory']:.2f}",
        }
        for row in rows
        if row["model"] == "widefield"
    ]
    return [("Same layout", lines)]
