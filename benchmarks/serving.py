"""Measure what routing costs in inference: fused soft MoRF against plain networks, in CPU time on one thread.

python benchmarks/serving.py [eager layers runtimes] [--repeats 64] [--batch-sizes 1 8] [--out DIR] [--suffix before]

- eager: ConvNeXt-T with 7x7 and with 11x11 kernels as timm makes it, the latter with our depthwise convolutions, and
  with fused mixtures of 3x3 to 11x11.
- layers: one such mixture against a plain 11x11 convolution on the maps of ConvNeXt-T's stages, in channels_last (the
  layout inside a ConvNeXt) and NCHW.
- runtimes: the exported files in onnxruntime (any batch size, and one form for one batch size) and OpenVINO (a file
  for each batch size).

Candidates take turns. Other programs may run meanwhile: times are those of the processor, and ratios are medians over
rounds.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import widefield.models  # noqa: F401  registers our networks
from widefield import _checks, deploy, report
from widefield.benchmarks.record import Bar, bar, publish
from widefield.benchmarks.settings import keep_freed_memory
from widefield.nn import DepthwiseConv2d, MoRFConv2d
from widefield.surgery import FastDepthwise, convert, reparameterize, specialize

SHAPES = (
    (1, 96, 56),
    (1, 192, 28),
    (1, 384, 14),
    (1, 768, 7),
    (8, 96, 56),
    (8, 192, 28),
    (8, 384, 14),
    (8, 768, 7),
    (16, 768, 7),
)
"""(batch, channels, side)."""

PLAIN = ("11x11", "11x11, FastDepthwise")
"""What mixtures are compared with: timm's network, and the same with our depthwise convolutions."""
FORMS = (*deploy.ROUTING, "blocked, fixed batch")
"""Mixtures in files; other candidates are plain."""

Rows = list[dict[str, Any]]
Calls = dict[str, Callable[[], object]]


def measure(calls: Calls, rounds: int, shortest_s: float = 0.0) -> dict[str, list[float]]:
    """Return the seconds of CPU time of a call, one for each round, in turns; short calls are repeated."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    counts = dict.fromkeys(calls, 1)
    items = list(calls.items())
    with torch.inference_mode():
        for turn in range(-2, rounds):
            first = turn // 2 % len(items)
            order = items[first:] + items[:first]
            for name, call in reversed(order) if turn % 2 else order:
                start = time.process_time()
                for _ in range(counts[name]):
                    call()
                spent = (time.process_time() - start) / counts[name]
                if turn < 0:
                    counts[name] = max(1, round(shortest_s / max(spent, 1e-7)))
                else:
                    seconds[name].append(spent)
    return seconds


def rows_of(
    seconds: dict[str, list[float]], references: tuple[str, ...], batch: int, **where: str
) -> list[dict[str, Any]]:
    """Return one row per candidate, with its time over that of each reference: the median over rounds."""
    rows = []
    for name, spent in seconds.items():
        row: dict[str, Any] = {**where, "candidate": name, "batch": batch, "ms": 1e3 * statistics.median(spent)}
        row["images_per_s"] = batch / statistics.median(spent)
        for reference in references:
            ratios = [mine / its for mine, its in zip(spent, seconds[reference], strict=True)]
            row[f"over {reference}"] = statistics.median(ratios)
            row[f"over {reference}, p20-p80"] = [
                float(q) for q in torch.tensor(ratios).double().quantile(torch.tensor([0.2, 0.8]).double())
            ]
        rows.append(row)
    return rows


def networks() -> dict[str, nn.Module]:
    """Return the networks of the eager part; the first three are plain."""
    torch.manual_seed(0)
    wide = timm.create_model("convnext_tiny", kernel_sizes=11).eval()
    return {
        "7x7": timm.create_model("convnext_tiny").eval(),
        "11x11": wide,
        "11x11, FastDepthwise": convert(wide, FastDepthwise()),
        "MoRF": reparameterize(timm.create_model("morf_convnext_tiny").eval(), torch.randn(1, 3, 224, 224)),
    }


def eager(repeats: int, batch_sizes: list[int]) -> list[dict[str, Any]]:
    """Measure whole networks."""
    models, rows = networks(), []
    for batch in batch_sizes:
        x = torch.randn(batch, 3, 224, 224)
        calls = {name: functools.partial(model, x) for name, model in models.items()}
        rows += rows_of(measure(calls, max(5, repeats // batch)), PLAIN, batch)
    return rows


def layers(repeats: int, batch_sizes: list[int]) -> list[dict[str, Any]]:
    """Measure single layers; ``batch_sizes`` chooses among SHAPES."""
    rows = []
    for batch, channels, side in SHAPES:
        if batch not in batch_sizes:
            continue
        torch.manual_seed(0)
        mixture = MoRFConv2d(channels, channels, groups=channels).eval().fuse()
        ours = DepthwiseConv2d(channels, channels, 11, padding=5).eval()
        stock = ours.fuse()
        for layout in ("channels_last", "contiguous_format"):
            x = torch.randn(batch, channels, side, side).contiguous(memory_format=getattr(torch, layout))
            calls = {
                name: functools.partial(layer, x)
                for name, layer in (("11x11", stock), ("11x11, FastDepthwise", ours), ("MoRF", mixture))
            }
            found = measure(calls, repeats, 5e-3)
            where = {"map": f"{channels} x {side}x{side}", "layout": layout.replace("contiguous_format", "NCHW")}
            rows += rows_of(found, PLAIN, batch, **where)
    return rows


def runtimes(repeats: int, batch_sizes: list[int]) -> list[dict[str, Any]]:
    """Measure exported files."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 224, 224)
    plain = timm.create_model("convnext_tiny").eval()
    mixed = timm.create_model("morf_convnext_tiny").eval()
    fused = reparameterize(mixed, x)
    static = reparameterize(specialize(mixed, [x]), x)
    rows = []
    with tempfile.TemporaryDirectory() as folder:

        def written(name: str, model: nn.Module, suffix: str, routing: str, batch: int | None) -> deploy.Runtime:
            path = Path(folder) / f"{name}-{routing}-{batch}{suffix}"
            dynamic = ("batch",) if batch is None else ()
            example = x if batch is None else torch.randn(batch, 3, 224, 224)
            deploy.export(model, path, example, routing=routing, dynamic=dynamic)
            return deploy.load(path)

        files = {"7x7": written("plain", plain, ".onnx", "branches", None)}
        files["11x11, specialized"] = written("static", static, ".onnx", "branches", None)
        files |= {routing: written("fused", fused, ".onnx", routing, None) for routing in deploy.ROUTING}
        for batch in batch_sizes:
            images = torch.randn(batch, 3, 224, 224)
            own = {"blocked, fixed batch": written("fused", fused, ".onnx", "blocked", batch)}
            calls = {name: functools.partial(run, images) for name, run in {**files, **own}.items()}
            rows += rows_of(measure(calls, max(5, repeats // batch)), ("7x7",), batch, runtime="onnxruntime")
        for batch in batch_sizes:
            images = torch.randn(batch, 3, 224, 224)
            fixed = {"7x7": written("plain", plain, ".xml", "branches", batch)}
            fixed["11x11, specialized"] = written("static", static, ".xml", "branches", batch)
            fixed |= {way: written("fused", fused, ".xml", way, batch) for way in ("branches", "per-sample")}
            calls = {name: functools.partial(run, images) for name, run in fixed.items()}
            rows += rows_of(measure(calls, max(5, repeats // batch)), ("7x7",), batch, runtime="OpenVINO")
    return rows


def eager_bars(rows: Rows) -> list[Bar]:
    """Return the bars of routing in whole networks."""

    def over(reference: str, batch: int, most: float) -> Bar:
        found = [
            {**row, "label": f"batch {batch}"} for row in rows if row["candidate"] == "MoRF" and row["batch"] == batch
        ]
        text = f"time of ConvNeXt-T with MoRF / {reference}, batch {batch}"
        return bar(text, found, lambda row: float(row[f"over {reference}"]), at_most=most)

    return [over(reference, *limit) for reference in PLAIN for limit in ((1, 1.03), (8, 1.01))]


def runtime_bars(rows: Rows) -> list[Bar]:
    """Return the bars of routing in files: the best form counts at each batch size."""

    def speed(runtime: str) -> Bar:
        mixtures = [row for row in rows if row["runtime"] == runtime and row["candidate"] in FORMS]
        best = [
            min((row for row in mixtures if row["batch"] == batch), key=lambda row: float(row["over 7x7"]))
            for batch in sorted({row["batch"] for row in mixtures})
        ]
        labeled = [{**row, "label": f"{row['candidate']}, batch {row['batch']}"} for row in best]
        text = f"speed of ConvNeXt-T with MoRF / 7x7, {runtime}"
        return bar(text, labeled, lambda row: 1 / float(row["over 7x7"]), at_least=0.9)

    return [speed(runtime) for runtime in ("onnxruntime", "OpenVINO")]


BARS: dict[str, Callable[[Rows], list[Bar]]] = {
    "eager": eager_bars,
    "layers": lambda rows: [],
    "runtimes": runtime_bars,
}


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Return a row as text."""
    cells = {}
    for key, value in row.items():
        if key == "ms":
            cells["ms"] = f"{value:.3g}" if value < 100 else f"{value:.0f}"
        elif key == "images_per_s":
            cells["images/s"] = f"{value:.4g}"
        elif key.endswith("p20-p80"):
            cells[key.removesuffix(", p20-p80")] += f" ({value[0]:.3f}-{value[1]:.3f})"
        else:
            cells[key] = f"{value:.3f}" if isinstance(value, float) else str(value)
    return cells


def publish_part(part: str, repeats: int, batch_sizes: list[int], folder: Path, suffix: str) -> None:
    """Measure a part, and write it."""
    rows = globals()[part](repeats, batch_sizes)
    sizes = " ".join(map(str, batch_sizes))
    command = f"python benchmarks/serving.py {part} --repeats {repeats} --batch-sizes {sizes}"
    name = "_".join(filter(None, ("serving", part, "cpu", suffix)))
    table = report.markdown([shown(row) for row in rows])
    print(table)
    text = f"CPU time on one thread; ratios are times over those of the reference.\n\n{table}"
    packages = ("onnxruntime", "openvino") if part == "runtimes" else ()
    publish(folder / name, command, {"rows": rows}, text, bars=BARS[part](rows), beside=packages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(BARS), help=f"of {', '.join(BARS)}; default: all")
    parser.add_argument("--repeats", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--suffix", default="", help="added to the names of the files, such as 'before'")
    args = parser.parse_args()
    for part in args.parts:
        _checks.choice("every part", part, BARS)
    torch.set_num_threads(1)
    keep_freed_memory()
    for part in args.parts:
        publish_part(part, args.repeats, args.batch_sizes, args.out, args.suffix)


if __name__ == "__main__":
    main()
