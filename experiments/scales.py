"""Compare five kernel designs on objects of all sizes: a narrow ConvNeXt on `scales`, equal epochs, several seeds.

python experiments/scales.py [--seeds 0 1 2] [--epochs 12] [--runs runs/scales] [--out experiments/results]
    [--KEY VALUE]

Finished runs in --runs are not trained again. --KEY VALUE changes the recipe `demo_scales`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trials
from torch import Tensor, nn
from torch.utils.data import DataLoader

from widefield import data, report
from widefield.analysis import block_contributions, routing_weights
from widefield.benchmarks.record import publish
from widefield.loading import load_trained
from widefield.train import ConversionSpec, Recipe, load_recipe

DESIGNS = {
    "3x3": {"kernel_sizes": 3},
    "7x7": {"kernel_sizes": 7},
    "11x11": {"kernel_sizes": 11},
    "MoRF soft": {"routing": "soft"},
    "MoRF hard": {"routing": "hard"},
}


def recipe(name: str, seed: int, epochs: int, output: Path, keys: Sequence[str] = ()) -> Recipe:
    own = ["--epochs", str(epochs), "--seed", str(seed), "--output", str(output)]
    base = load_recipe("demo_scales", [*own, *keys])
    base = dataclasses.replace(base, name=f"{name.lower().replace(' ', '-')}-{seed}")
    design = DESIGNS[name]
    if "kernel_sizes" in design:
        return dataclasses.replace(base, model=dataclasses.replace(base.model, args={**base.model.args, **design}))
    return dataclasses.replace(base, conversion=ConversionSpec("morf", "*.conv_dw", design))


def trained(plan: Recipe) -> nn.Module:
    """Return the last model of a run; train it first if needed. A finished run of another recipe is an error."""
    config = plan.folder / "config.yaml"
    if config.exists() and load_recipe(config) != plan:
        raise SystemExit(f"{plan.folder} is a run of another recipe: choose another folder with --runs.")
    log = plan.folder / "metrics.jsonl"

    lines = log.read_text().splitlines() if log.exists() else []
    if sum(json.loads(line)["kind"] == "epoch" for line in lines) < plan.epochs:
        trials.trained(plan)
    return load_trained(plan.folder, "last")


def hits(model: nn.Module, validation: data.LabeledImages) -> Tensor:
    with torch.no_grad():
        batches = DataLoader(validation, batch_size=250, collate_fn=data.collate)
        return torch.cat([model(batch["image"]).argmax(1) == batch["label"] for batch in batches]).float()


def contributions(model: nn.Module, validation: data.LabeledImages) -> dict[str, Any]:
    """Return the accuracy without each residual block, and without all of them, in percent."""
    batches = DataLoader(validation, batch_size=250, collate_fn=data.collate)
    found = block_contributions(model, [(batch["image"], batch["label"]) for batch in batches])
    without = {block.name: 100 * (block.score or 0.0) for block in found.blocks}
    return {"without": without, "without_all": 100 * (found.together.score or 0.0)}


def ranks(values: Tensor) -> Tensor:
    """Return ranks; ties share their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()


def size_wanted(model: nn.Module, validation: data.LabeledImages, sizes: Tensor) -> list[dict]:
    """Return, for each block, how its mixed kernel size correlates with the size of the object."""
    found = []
    batches = [batch["image"] for batch in DataLoader(validation, batch_size=250, collate_fn=data.collate)]
    for block in routing_weights(model, batches):
        wanted = torch.from_numpy(block.fields()).float()
        rank = float(torch.corrcoef(torch.stack([ranks(wanted), ranks(sizes)]))[0, 1]) if wanted.std() > 0 else 0.0
        quarters = sizes <= sizes.quantile(0.25), sizes >= sizes.quantile(0.75)
        low, high = (wanted[part].mean().item() for part in quarters)
        found.append(
            {"block": block.name, "mean": wanted.mean().item(), "std": wanted.std().item(), "rank": rank,
             "smallest": low, "largest": high}
        )  # fmt: skip
    return found


def spread(values: list[float], digits: int = 1) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def one_off(entries: list[dict]) -> str:
    """Return the lowest and the highest accuracy without one block, over the seeds."""
    found = [score for entry in entries for score in entry["without"].values()]
    return f"{min(found):.1f} to {max(found):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--runs", type=Path, default=Path("runs/scales"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args, keys = parser.parse_known_args()
    validation = data.create("scales", "val")
    sizes = torch.cat([batch["size"] for batch in DataLoader(validation, batch_size=250, collate_fn=data.collate)])
    low, high = validation.object_sizes
    edges = [low * (high / low) ** (i / 4) for i in range(5)]
    bins = {f"{a:.0f} to {b:.0f} px": (sizes >= a) & (sizes <= b + (math.inf if b == edges[-1] else 0))
            for a, b in itertools.pairwise(edges)}  # fmt: skip

    results: dict[str, list[dict]] = {name: [] for name in DESIGNS}
    for seed in args.seeds:
        for name in DESIGNS:
            start = time.perf_counter()
            model = trained(recipe(name, seed, args.epochs, args.runs, keys))
            hit = hits(model, validation)
            entry = {
                "seed": seed,
                "top1": 100 * hit.mean().item(),
                "by_size": {label: 100 * hit[inside].mean().item() for label, inside in bins.items()},
                "parameters": sum(p.numel() for p in model.parameters()),
                **contributions(model, validation),
            }
            if name.startswith("MoRF"):
                entry["routing"] = size_wanted(model, validation, sizes)
            results[name].append(entry)
            print(f"{name} seed {seed}: {entry['top1']:.1f}% ({time.perf_counter() - start:.0f} s)", flush=True)

    rows = [
        {
            "kernels": name,
            "parameters": f"{entries[0]['parameters']:,}",
            "top-1, %": spread([e["top1"] for e in entries]),
            "all blocks off": spread([e["without_all"] for e in entries]),
            "one block off": one_off(entries),
            **{label: spread([e["by_size"][label] for e in entries], 0) for label in bins},
        }
        for name, entries in results.items()
    ]
    routed = [
        {
            "network": name,
            "block": blocks[0]["block"],
            "kernel wanted": spread([b["mean"] for b in blocks], 2),
            "over images": spread([b["std"] for b in blocks], 2),
            "smallest objects": spread([b["smallest"] for b in blocks], 2),
            "largest objects": spread([b["largest"] for b in blocks], 2),
            "rank correlation": spread([b["rank"] for b in blocks], 2),
        }
        for name, entries in results.items()
        if "routing" in entries[0]
        for blocks in zip(*(e["routing"] for e in entries), strict=True)
    ]
    command = f"python experiments/scales.py --seeds {' '.join(map(str, args.seeds))} --epochs {args.epochs}"
    command = " ".join([command, *keys])
    publish(
        args.out / "scales",
        command,
        {"results": results},
        f"Mean ± standard deviation over {len(args.seeds)} seeds; the same epochs, batches "
        f"and schedule for all. {len(validation)} validation images. A block that is off returns its input.\n\n"
        f"{report.markdown(rows)}\n"
        "Routing and object size: the mixed kernel size of each block, in pixels of its map, as "
        "the mean of its experts' sizes weighted by |w| / sum |w|; its spread over the images; its mean for the "
        "quarter with the smallest and with the largest objects; Spearman's rank correlation with the object's "
        "size.\n\n"
        f"{report.markdown(routed)}",
    )


if __name__ == "__main__":
    main()
