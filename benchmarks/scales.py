"""How hard `scales` is: one narrow ConvNeXt (recipe demo_scales, 12 epochs), several designs, accuracy by object size.

python benchmarks/scales.py [--seeds 0] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.data import DataLoader

from widefield import bench, data, report
from widefield.train import ConversionSpec, Recipe, load_recipe, train

DESIGNS = {
    "3x3": {"kernel_sizes": 3},
    "7x7": {"kernel_sizes": 7},
    "11x11": {"kernel_sizes": 11},
    "MoRF soft": {"routing": "soft"},
    "MoRF soft, softmax": {"routing": "soft", "attention": "softmax"},
    "MoRF hard": {"routing": "hard"},
}


def recipe(design: dict, seed: int, output: str) -> Recipe:
    base = load_recipe("demo_scales", ["--epochs", "12", "--seed", str(seed), "--output", output])
    if "kernel_sizes" in design:
        return dataclasses.replace(base, model=dataclasses.replace(base.model, args={**base.model.args, **design}))
    return dataclasses.replace(base, conversion=ConversionSpec("morf", "*.conv_dw", design))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    validation = data.create("scales", "val")
    low, high = validation.object_sizes
    edges = [low * (high / low) ** (i / 4) for i in range(5)]
    rows = []
    for seed in args.seeds:
        for name, design in DESIGNS.items():
            with tempfile.TemporaryDirectory() as output:
                start = time.perf_counter()
                result = train(recipe(design, seed, output), console=Console(quiet=True))
                seconds = time.perf_counter() - start
            right, sizes = [], []
            with torch.no_grad():
                for batch in DataLoader(validation, batch_size=250, collate_fn=data.collate):
                    right.append(result.model(batch["image"]).argmax(1) == batch["label"])
                    sizes.append(batch["size"])
            hit, size = torch.cat(right).float(), torch.cat(sizes)
            row = {"kernels": name, "seed": str(seed), "all sizes": f"{100 * hit.mean():.1f}%"}
            for a, b in itertools.pairwise(edges):
                inside = (size >= a) & (size <= b + (math.inf if b == edges[-1] else 0))
                row[f"{a:.0f} to {b:.0f} px"] = f"{100 * hit[inside].mean():.0f}%"
            rows.append({**row, "training": f"{seconds:.0f} s"})
            print(" | ".join(rows[-1].values()), flush=True)
    about = ", ".join(f"{key} {value}" for key, value in bench.environment().items())
    command = f"python benchmarks/scales.py --seeds {' '.join(map(str, args.seeds))}"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scales.md").write_text(f"`{command}`: {about}\n\n{report.markdown(rows)}")


if __name__ == "__main__":
    main()
