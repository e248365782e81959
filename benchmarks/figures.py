"""Draw docs/images/depthwise.png from the results of `widefield bench depthwise --out benchmarks/results`.

python benchmarks/figures.py
"""

import json
from pathlib import Path

from widefield import report

ROOT = Path(__file__).parent.parent
LINES = [("forward", "NCHW"), ("weight_grad", "NCHW"), ("weight_grad", "channels_last"), ("input_grad", "NCHW")]


def main() -> None:
    tables = json.loads((ROOT / "benchmarks/results/depthwise_cpu.json").read_text())["tables"]
    rows = [row for row in tables["RepLKNet, table 1"] if row["side"] == 32]
    lines = {}
    for step, layout in LINES:
        found = sorted((int(r["kernel"]), r["same_layout"]) for r in rows if (r["step"], r["layout"]) == (step, layout))
        lines[f"{step.replace('_grad', ' gradient')}, {layout}"] = tuple(zip(*found, strict=True))
    figure = report.curves(lines, "kernel size, 384 channels on 32x32", "times as fast as F.conv2d")
    axis = figure.axes[0]
    axis.set_yscale("log")
    axis.axhline(1, color="grey", linewidth=1)
    axis.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    (ROOT / "docs/images/depthwise.png").write_bytes(report.png(figure))


if __name__ == "__main__":
    main()
