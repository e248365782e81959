"""Measure what decoding heatmaps costs, as a share of a pose model's inference.

python benchmarks/pose.py [--batch-size 32] [--size 256 192] [--out benchmarks/results]

Each repeat runs a model on one batch of crops and decodes its heatmaps by all three rules. The share of a rule is its
time over that of the model and itself in the same repeat; the median over repeats counts. Times are CPU time of the
process with one thread, which other work on the machine changes little. There is no flip test, which would double the
model's time and not that of decoding.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import widefield
from widefield import bench
from widefield.benchmarks import Settings
from widefield.benchmarks.record import Record, Row, bar
from widefield.dense import HeatmapPose
from widefield.dense.heatmap_codec import CODECS, HeatmapCodec

KEYPOINTS = 17
MOST = 0.05
"""Largest share of decoding at batch 32."""

COLUMNS: dict[str, Callable[[Row], str]] = {
    "backbone": lambda r: str(r["backbone"]),
    "parameters": lambda r: f"{r['parameters'] / 1e6:.1f}M",
    "MACs of a crop": lambda r: f"{r['macs'] / 1e9:.2f}G",
    "rule": lambda r: str(r["rule"]),
    "model, ms": lambda r: _range(r["model_ms"]),
    "decoding, ms": lambda r: _range(r["decoding_ms"]),
    "share of decoding": lambda r: f"{100 * r['share']:.2f} %",
}


def _range(times: list[float]) -> str:
    return f"{statistics.median(times):.1f} ({min(times):.1f}-{max(times):.1f})"


def spent(call: Callable[[], object]) -> float:
    """Return the CPU time of a call in milliseconds."""
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def measured(model: HeatmapPose, crops: Tensor, repeats: int) -> list[Row]:
    """Return a row for each rule with times of the model and of decoding, one of each per repeat."""
    size = crops.shape[2], crops.shape[3]
    times: dict[str, list[tuple[float, float]]] = {rule: [] for rule in CODECS}
    with torch.inference_mode():
        heatmaps = model(crops)  # the first run prepares weights and memory
        shape = heatmaps.shape[2], heatmaps.shape[3]
        codecs = {rule: HeatmapCodec(size, shape, kind=rule) for rule in CODECS}
        for codec in codecs.values():
            codec.decode(heatmaps)
        for _ in range(repeats):
            forward = spent(lambda: model(crops))
            for rule, codec in codecs.items():
                times[rule].append((forward, spent(lambda codec=codec: codec.decode(heatmaps))))  # type: ignore[misc]
    rows = []
    for rule, pairs in times.items():
        shares = [decoding / (forward + decoding) for forward, decoding in pairs]
        rows.append(
            {
                "rule": rule,
                "model_ms": [forward for forward, _ in pairs],
                "decoding_ms": [decoding for _, decoding in pairs],
                "shares": shares,
                "share": statistics.median(shares),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["moganet_xtiny", "resnet18", "resnet50"])
    parser.add_argument("--size", type=int, nargs=2, default=[256, 192], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = shlex.join(["python", "benchmarks/pose.py", *sys.argv[1:]])
    out = Record("pose", Settings(command, repeats=args.repeats, out=args.out))
    height, width = args.size
    out.fact(
        f"Heatmaps of {KEYPOINTS} key points, crops of {height}x{width} pixels, batch {args.batch_size}; CPU time with "
        f"one thread, median (least-most) of {args.repeats} repeats; widefield {widefield.__version__}."
    )
    table = out.table("Decoding", COLUMNS)
    crops = torch.randn(args.batch_size, 3, height, width, generator=torch.Generator().manual_seed(0))
    with out.until_interrupted():
        for name in args.backbone:
            torch.manual_seed(0)
            model = HeatmapPose(name, KEYPOINTS).eval()
            cost = bench.cost(model, crops[:1])
            facts = {"backbone": name, "parameters": cost.parameters, "macs": cost.macs}
            for row in measured(model, crops, args.repeats):
                out.add(table, {"label": f"{name}, {row['rule']}", **facts, **row})
    limits = f"decoding's share of inference, batch {args.batch_size}"
    out.finish([bar(limits, table.rows, lambda row: row["share"], at_most=MOST)])


if __name__ == "__main__":
    main()
