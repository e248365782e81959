"""Draw docs/images/whole_models_{light,dark}.png from benchmarks/results/whole_models_cpu.json.

python benchmarks/figures_whole_models.py
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from widefield import report

ROOT = Path(__file__).parent.parent
INKS = {"light": ("#222222", "#0072B2", "#8fa1ad"), "dark": ("#dddddd", "#56B4E9", "#6b7780")}
"""Of text, of our bars, and of the line at 1."""
MARKS = {
    "torch.compile, stock": ("s", report.COLORS[1], False),
    "torch.compile, ours": ("s", report.COLORS[1], True),
    "onnxruntime": ("D", report.COLORS[2], True),
    "OpenVINO": ("^", report.COLORS[3], True),
}
"""Of other ways to run a network: marker, color, and whether it is filled."""
TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20)


def panel(axis: Any, rows: list[dict[str, Any]], mode: str, inks: tuple[str, ...]) -> None:
    """Draw how many times as fast as the best eager stock network each network runs."""
    for place, row in enumerate(rows):
        if mode not in row or "missing" in row[mode]:
            continue
        speed = row[mode]["ratio"]
        axis.barh(place, speed - 1, left=1, height=0.55, color=inks[1], zorder=2)
        axis.annotate(
            f"{speed:.2f}", (1, place), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=7
        )
        for name, (marker, color, filled) in MARKS.items() if mode == "inference" else ():
            if "ratio" in row.get(name, {}):
                axis.plot(
                    speed / row[name]["ratio"], place, marker, color=color, markersize=4.5, zorder=3,
                    markerfacecolor=color if filled else "none",
                )  # fmt: skip
    axis.axvline(1, color=inks[2], linewidth=1, zorder=1)
    axis.annotate(
        "widefield", (1, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", ha="right", fontsize=7
    )
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.8), max(high * 1.25, 1.5))
    axis.set_xticks([tick for tick in TICKS if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]])
    axis.set_xticklabels([f"{tick:g}" for tick in axis.get_xticks()])
    axis.minorticks_off()
    axis.grid(axis="x", alpha=0.2)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def drawn(rows: list[dict[str, Any]], inks: tuple[str, ...]) -> bytes:
    """Return the chart as a PNG file without a background."""
    colored = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor", "grid.color"), inks[0]
    )
    with matplotlib.rc_context({**colored, "font.size": 8, "axes.titlesize": 9}):
        figure = Figure(figsize=(7.6, 0.34 * len(rows) + 1.5), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.5, 1))
        panel(left, rows, "inference", inks)
        panel(right, rows, "step", inks)
        left.set_yticks(range(len(rows)), [row["label"] for row in rows])
        left.invert_yaxis()
        left.set_title("Inference", loc="left")
        right.set_title("Training step", loc="left")
        figure.supxlabel("times as fast as the best eager stock network, one CPU thread", fontsize=8)
        handles = [matplotlib.patches.Patch(color=inks[1], label="widefield, eager")]
        for name, (marker, color, filled) in MARKS.items():
            face = color if filled else "none"
            handles.append(
                matplotlib.lines.Line2D([], [], marker=marker, color=color, linestyle="", markerfacecolor=face,
                                        markersize=4.5, label=name)
            )  # fmt: skip
        figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=7)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, bbox_inches="tight", transparent=True)
    return buffer.getvalue()


def main() -> None:
    rows = json.loads((ROOT / "benchmarks/results/whole_models_cpu.json").read_text())["rows"]
    for theme, inks in INKS.items():
        (ROOT / f"docs/images/whole_models_{theme}.png").write_bytes(drawn(rows, inks))


if __name__ == "__main__":
    main()
