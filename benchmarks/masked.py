"""Measure what a mask costs: a step of masked pre-training against one of the same dense network and decoder.

python benchmarks/masked.py [--backbone NAME ...] [--size 224] [--batch-size 4] [--out benchmarks/results]

A step is forward, loss and backward in training mode, without the optimizer. Both steps are of one model, on the same
images, with the same decoder and the same loss at the same pixels; the dense one sets no mask while the encoder runs.
Each repeat takes both in turn, and the median of the repeats' ratios counts. Times are CPU time of the process with one
thread, which other work on the machine changes little. Memory is the largest sum of the tensors that a step holds, as
torch.profiler counts them.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from peers import peak_bytes
from torch import Tensor, nn

import widefield
from widefield.benchmarks import Settings
from widefield.benchmarks.record import Record, Row, bar
from widefield.benchmarks.settings import LAYOUTS
from widefield.masking import MaskedAutoencoder
from widefield.surgery import MoRF, convert

MOST = 1.15
"""Largest ratio of a masked step to a dense one."""
MIXTURE = "convnext_atto with MoRF"
BACKBONES = ("convnextv2_atto", "resnet18", "resnet50", "efficientnet_b0", "unireplknet_a", MIXTURE)

COLUMNS: dict[str, Callable[[Row], str]] = {
    "backbone": lambda r: str(r["backbone"]),
    "method": lambda r: str(r["method"]),
    "layout": lambda r: str(r["layout"]),
    "dense step, ms": lambda r: _range(r["dense_ms"]),
    "masked step, ms": lambda r: _range(r["masked_ms"]),
    "ratio": lambda r: f"{r['ratio']:.2f}",
    "memory, masked / dense": lambda r: f"{r['masked_bytes'] / r['dense_bytes']:.2f}",
}


def _range(times: list[float]) -> str:
    return f"{statistics.median(times):.0f} ({min(times):.0f}-{max(times):.0f})"


def network(name: str) -> nn.Module:
    """Return a backbone; the mixture has depthwise kernels of 3, 7 and 13 pixels."""
    if name == MIXTURE:
        return convert(timm.create_model("convnext_atto"), MoRF(kernel_sizes=(3, 7, 13)))
    return timm.create_model(name)


def steps(model: MaskedAutoencoder, images: Tensor, mask: Tensor) -> dict[str, Callable[[], None]]:
    """Return the two steps by name."""
    visible = mask[0].numel() - int(mask[0].sum())

    def dense() -> None:
        prediction = model.decoder(model.encoder(model.filled(images, mask)), mask)
        sum(model.losses(prediction, images, mask).values(), torch.zeros(())).backward()
        model.zero_grad()

    def masked() -> None:
        sum(model(images, mask, visible).values(), torch.zeros(())).backward()
        model.zero_grad()

    return {"dense": dense, "masked": masked}


def measured(calls: dict[str, Callable[[], None]], repeats: int) -> Row:
    """Return CPU times in milliseconds, their ratio, and peak memory."""
    for call in calls.values():  # the first calls prepare memory
        call()
    found: Row = {f"{name}_bytes": peak_bytes(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name in sorted(calls, reverse=bool(repeat % 2)):
            start = time.process_time()
            calls[name]()
            times[name].append(1e3 * (time.process_time() - start))
    ratios = [masked / dense for masked, dense in zip(times["masked"], times["dense"], strict=True)]
    found |= {f"{name}_ms": values for name, values in times.items()}
    return {**found, "ratios": ratios, "ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=list(BACKBONES))
    parser.add_argument("--method", nargs="+", default=["fcmae", "spark"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = Record("masked", Settings(shlex.join(["python", "benchmarks/masked.py", *sys.argv[1:]]), out=args.out))
    out.fact(
        f"Images of {args.size}x{args.size} pixels, {args.batch_size} a step, patches of 32; CPU time with one thread, "
        f"median (least-most) of {args.repeats} repeats; widefield {widefield.__version__}."
    )
    table = out.table("A training step", COLUMNS)
    with out.until_interrupted():
        for method in args.method:
            for name in args.backbone:
                for layout, memory_format in LAYOUTS.items():
                    torch.manual_seed(0)
                    model = MaskedAutoencoder(network(name), method).train().to(memory_format=memory_format)
                    images = torch.randn(args.batch_size, 3, args.size, args.size).to(memory_format=memory_format)
                    mask = model.method.mask.draw(args.batch_size, args.size, args.size)
                    row = {"backbone": name, "method": method, "layout": layout}
                    row |= measured(steps(model, images, mask), args.repeats)
                    out.add(table, {"label": f"{name}, {method}, {layout}", **row})
    out.finish([bar("masked step / dense step", table.rows, lambda row: row["ratio"], at_most=MOST)])


if __name__ == "__main__":
    main()
