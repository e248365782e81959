"""Measure trimming: a GMConv network is trained on digits, reparameterized, trimmed, and timed before and after.

python benchmarks/trim.py [--epochs 8] [--repeats 21] [--out benchmarks/results]

A narrow ConvNeXt with 31x31 depthwise kernels under learned Gaussian masks. Its kernels are cropped by the guarantee
for each layer, for whatever data, and by a budget for the outputs, measured on training images. Accuracy and change are
those on the validation images, which neither training nor trimming has seen. All networks are timed in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from widefield import bench, data, report
from widefield.benchmarks.record import publish
from widefield.nn import GMConv2d
from widefield.surgery import FastDepthwise, convert
from widefield.surgery.compare import compare
from widefield.surgery.reparameterize import reparameterize
from widefield.surgery.trim import trim
from widefield.surgery.trim_report import Trimming
from widefield.train import ConversionSpec, DataSpec, ModelSpec, OptimizerSpec, Recipe, train

SIZE = 32
WHOLE = "reparameterized"
WAYS: dict[str, dict[str, Any]] = {
    "exact, for 32x32 only": {"tolerance": 0.0, "example_input": SIZE},
    "guarantee 0.01": {"tolerance": 0.01},
    "guarantee 0.05": {"tolerance": 0.05},
    "budget 0.01": {"tolerance": 0.01, "loader": "training images"},
    "budget 0.03": {"tolerance": 0.03, "loader": "training images"},
}
BATCHES = (1, 64)


def trained(epochs: int) -> nn.Module:
    """Return the network, in evaluation mode."""
    shape = {
        "patch_size": 1,
        "depths": [1, 1, 1, 1],
        "dims": [16, 32, 48, 64],
        "kernel_sizes": 31,
        "ls_init_value": 1e-6,
    }
    with tempfile.TemporaryDirectory() as output:
        recipe = Recipe(
            name="trim",
            model=ModelSpec("convnext_tiny", shape),
            data=DataSpec("digits", {"size": SIZE, "augment": True}),
            conversion=ConversionSpec("gmconv", "*.conv_dw", {"sigma": 2.5, "init": "random"}),
            optimizer=OptimizerSpec(lr=3e-3, weight_decay=0.05),
            output=output,
            epochs=epochs,
            batch_size=32,
            workers=0,
        )
        return train(recipe, console=Console(quiet=True)).model.cpu().eval()


def batches(split: str) -> list[Any]:
    """Return all images of a split with their labels, without augmentation."""
    return list(DataLoader(data.create("digits", split, size=SIZE), batch_size=128, collate_fn=data.collate))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    model = trained(args.epochs)
    sigmas = [module.sigma.item() for module in model.modules() if isinstance(module, GMConv2d)]
    seen, held_out = batches("train")[:4], batches("val")
    images = torch.cat([batch["image"] for batch in held_out])
    models = {WHOLE: reparameterize(model, images[:2])}
    trimmings: dict[str, Trimming] = {}
    for way, given in WAYS.items():
        reports: list[Trimming] = []
        loader = {"loader": seen} if "loader" in given else {}
        models[way] = trim(models[WHOLE], **{**given, **loader}, report=reports.append)
        trimmings[way] = reports[0]
    changes = {way: compare(models[WHOLE], each, held_out) for way, each in models.items()}
    times = {}
    served = {way: convert(each, FastDepthwise()) for way, each in models.items()}  # fast kernels for large sizes
    for size in BATCHES:
        with torch.inference_mode():
            calls = {way: partial(each, images[:size]) for way, each in served.items()}
            times[size] = bench.measure(calls, repeats=args.repeats, warmup=3, shortest_s=0.02)
    rows = []
    for way, each in models.items():
        change, cost = changes[way], bench.cost(each, images[:1])
        kernels = [module.kernel_size[0] for name, module in each.named_modules() if name.endswith("conv_dw")]
        row = {
            "": way,
            "kernels": ", ".join(map(str, kernels)),
            "parameters": f"{cost.parameters:,}",
            "MACs": f"{cost.macs / 1e6:.2f}M",
        }
        for size, found in times.items():
            row[f"ms, batch {size}"] = (
                f"{1e3 * found[way].p50:.2f} ({1e3 * found[way].p20:.2f}-{1e3 * found[way].p80:.2f}), "
                f"{found[WHOLE].p50 / found[way].p50:.2f}x"
            )
        seen_change = trimmings[way].change if way in trimmings else None
        row["change, seen images"] = "-" if seen_change is None else f"{seen_change.rms:.4f}"
        row["change, held out"] = f"{change.rms:.4f}"
        row["right, held out"] = f"{round(change.images * (change.accuracy_after or 0))} of {change.images}"
        rows.append(row)
        print(" | ".join(row.values()), flush=True)
    command = f"python benchmarks/trim.py --epochs {args.epochs} --repeats {args.repeats}"
    results = {
        way: {
            "trimming": trimmings[way].to_dict() if way in trimmings else None,
            "held_out": dataclasses.asdict(changes[way]),
            "times": {size: found[way].to_dict() for size, found in times.items()},
        }
        for way in models
    }
    publish(
        args.out / "trim_cpu",
        command,
        {"sigmas": sigmas, "results": results},
        f"A ConvNeXt with 31x31 kernels under Gaussian masks (learned sigmas: "
        f"{', '.join(f'{sigma:.2f}' for sigma in sigmas)} taps), trained on digits of {SIZE}x{SIZE} pixels. Times are "
        "medians of interleaved runs of the eager model, with the 20th and 80th percentile, and how many times as fast "
        "as before. Change is the relative RMS of the outputs, on the training images that the budget was measured on "
        f"and on the {len(images)} validation images.\n\n{report.markdown(rows)}",
    )


if __name__ == "__main__":
    main()
