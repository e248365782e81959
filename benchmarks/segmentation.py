"""Measure UPerNet here against segmentation-models-pytorch's with the same timm encoder: inference and a training step.

python benchmarks/segmentation.py [--backbone convnext_tiny] [--size 512] [--batch-size 2] [--out benchmarks/results]

- ``inference``: forward under ``torch.inference_mode()``, in evaluation mode.
- ``step``: forward, cross-entropy at the size of the images and backward in training mode; no optimizer.

Both have the same backbone, a LayerNorm on each of its four outputs, 512 channels in the head, 150 classes and no
auxiliary head; theirs upsamples by 4 with aligned corners, ours to the size of the images without. Ours has dropout
before the classifier. Calls are interleaved. Memory is the largest sum of the tensors that a call allocates, as
torch.profiler counts them; oneDNN's own buffers are not in it.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from peers import bars_of, digest_of, peak_bytes, rows_of
from torch import Tensor, nn

import widefield
from widefield import bench
from widefield.benchmarks import Settings, record
from widefield.benchmarks.record import Record, Row
from widefield.benchmarks.settings import LAYOUTS
from widefield.dense import UPerNet

CLASSES = 150
CHANNELS = 512
PEER = "smp"

COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda r: str(r["model"]),
    "parameters": lambda r: f"{r['parameters'] / 1e6:.2f}M",
    "MACs": lambda r: f"{r['macs'] / 1e9:.1f}G",
    "mode": lambda r: str(r["mode"]),
    "layout": lambda r: str(r["layout"]),
    "ms (p20-p80)": lambda r: record.milliseconds(r["time"]),
    "smp, same layout / this": lambda r: f"{r['same_layout']:.2f}",
    "smp, better layout / this": lambda r: f"{r['better_layout']:.2f}",
    "peak memory": lambda r: f"{r['peak_bytes'] / 2**20:.0f} MiB",
    "smp's memory / this": lambda r: f"{r['memory']:.2f}",
}


def models(backbone: str, x: Tensor) -> dict[str, dict[str, nn.Module]]:
    """Return mode -> name -> model, theirs first."""
    torch.manual_seed(0)
    theirs = smp.UPerNet(f"tu-{backbone}", encoder_weights=None, decoder_channels=CHANNELS, classes=CLASSES)
    ours = UPerNet(backbone, CLASSES, channels=CHANNELS, auxiliary=False)
    full = UPerNet(backbone, CLASSES, channels=CHANNELS)
    merged = widefield.reparameterize(ours.eval(), x[:1, :, :64, :64])
    return {
        "inference": {PEER: theirs, "widefield": ours, "reparameterized": merged},
        "step": {PEER: theirs, "widefield": ours, "with auxiliary head": full},
    }


def call(model: nn.Module, x: Tensor, mode: str) -> Callable[[], None]:
    """Return a call of one mode; the model must be in the mode that goes with it."""
    labels = torch.randint(CLASSES, (len(x), *x.shape[2:]), generator=torch.Generator().manual_seed(0))

    def infer() -> None:
        with torch.inference_mode():
            model(x)

    def step() -> None:
        outputs = model(x)
        main, *rest = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = F.cross_entropy(main, labels)
        for auxiliary in rest:
            loss = loss + 0.4 * F.cross_entropy(auxiliary, labels)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step if mode == "step" else infer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="convnext_tiny")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for all timings of a call")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    command = shlex.join(["python", "benchmarks/segmentation.py", *sys.argv[1:]])
    settings = Settings(command, repeats=args.repeats, budget_s=args.budget, out=args.out)
    out = Record("segmentation", settings)
    out.fact(
        f"UPerNet with {args.backbone}, {args.size}x{args.size} pixels, batch {args.batch_size}, {CHANNELS} channels, "
        f"{CLASSES} classes; segmentation-models-pytorch {smp.__version__}. MACs are of one image, in evaluation mode."
    )
    table = out.table("UPerNet", COLUMNS)
    x = torch.randn(args.batch_size, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    with out.until_interrupted():
        for mode, found in models(args.backbone, x).items():
            costs = {name: bench.cost(model.eval(), x[:1]) for name, model in found.items()}
            measured, memory = measure(settings, found, x, mode)
            facts = {name: {"parameters": cost.parameters, "macs": cost.macs} for name, cost in costs.items()}
            for row in rows_of(PEER, mode, measured, memory, facts):
                out.add(table, row)
    out.finish(bars_of(table.rows, PEER), digest_of(table.rows, PEER))


def measure(
    settings: Settings, found: dict[str, nn.Module], x: Tensor, mode: str
) -> tuple[dict[str, bench.Row], dict[str, int]]:
    """Return times and peak memory of "MODEL, LAYOUT", for all models and layouts in turns."""
    calls = {}
    for layout, memory_format in LAYOUTS.items():
        for name, model in found.items():
            own = copy.deepcopy(model).to(memory_format=memory_format).train(mode == "step")
            calls[f"{name}, {layout}"] = call(own, x.contiguous(memory_format=memory_format), mode)
    return settings.measure(calls), {key: peak_bytes(run) for key, run in calls.items()}


if __name__ == "__main__":
    main()
