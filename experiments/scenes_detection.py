"""Compare kernel designs in a small detector on `scenes`: equal budget, several seeds, AP by object size.

nice python experiments/scenes_detection.py [--seeds 0 1 2] [--designs 3x3 7x7 GMConv MoRF] [--out experiments/results]

Each row is one run of the recipe `demo_scenes_faster_rcnn` with other depthwise convolutions in its backbone. The files
in --out are written after every row, and rows that they hold already are not run again. An interrupted run in --runs is
continued.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from trials import started, trained

from widefield import data, report, tasks
from widefield.analysis import BlockContributions, block_contributions
from widefield.benchmarks.record import publish
from widefield.report import Report
from widefield.train import ConversionSpec, Recipe, load_recipe
from widefield.train.evaluation import measure
from widefield.train.loaders import batches, val_loader

DESIGNS: dict[str, tuple[int, ConversionSpec | None]] = {
    "3x3": (3, None),
    "7x7": (7, None),
    "GMConv": (7, ConversionSpec("gmconv", "*.conv_dw", {"body": "static", "init": "random"})),
    "MoRF": (7, ConversionSpec("morf", "*.conv_dw", {"kernel_sizes": [3, 7, 13], "routing": "soft", "init": "random"})),
}
"""Name -> kernel size of all depthwise convolutions, and their conversion."""

_METRICS = {"AP": "box_ap", "AP50": "box_ap50", "AP75": "box_ap75"}


def recipe(name: str, seed: int, runs: Path, base: str) -> Recipe:
    plan = load_recipe(base, ["--seed", str(seed), "--output", str(runs), "--trackers", "[]"])
    kernel, conversion = DESIGNS[name]
    args = {**plan.model.args, "kernel_sizes": kernel}
    model = dataclasses.replace(plan.model, args=args)
    return dataclasses.replace(
        plan, name=f"{Path(base).stem}-{name.lower()}-{seed}", model=model, conversion=conversion
    )


def measured(name: str, seed: int, runs: Path, base: str) -> dict[str, Any]:
    """Train one model, and return its row."""
    plan = recipe(name, seed, runs, base)
    resumed, start = started(plan), time.perf_counter()
    result = trained(plan)
    return {
        "design": name,
        "seed": seed,
        "steps": result.steps,
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "seconds": time.perf_counter() - start,
        "resumed": resumed,
        "metrics": {key: value if math.isfinite(value) else None for key, value in result.metrics.items()},
        "scores": scores(plan, result.model).to_dict(),
        "blocks": contributions(plan, result.model).to_dict(),
    }


def contributions(plan: Recipe, model: torch.nn.Module) -> BlockContributions:
    """Return what each residual block contributes to the box AP of 100 val scenes."""
    val = data.create(plan.data.name, "val", **plan.data.args)
    task = tasks.create(plan.task.name, val, **plan.task.args)
    loader = DataLoader(Subset(val, range(min(100, len(val)))), batch_size=20, collate_fn=task.collate)
    found = block_contributions(model, loader, name=plan.name)
    print(found.line, flush=True)
    return found


def scores(plan: Recipe, model: torch.nn.Module) -> Report:
    """Return all results of a trained model on the val split."""
    val = data.create(plan.data.name, "val", **plan.data.args)
    task = tasks.create(plan.task.name, val, **plan.task.args)
    found = measure(model, batches(val_loader(val, task.collate, plan.batch_size, 0)), task).scores
    if found is None:
        raise SystemExit(f"the task {plan.task.name} has no scores; give a recipe for detection.")
    return found


def spread(values: list[float | None]) -> str:
    """Return mean and standard deviation in percent; a dash without objects."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    mean = 100 * statistics.fmean(known)
    return f"{mean:.1f} ± {100 * statistics.stdev(known):.1f}" if len(known) > 1 else f"{mean:.1f}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for name in DESIGNS:
        own = [row for row in rows if row["design"] == name]
        if not own:
            continue
        line = {"kernels": name, "parameters": f"{own[0]['parameters']:,}", "seeds": str(len(own))}
        line |= {title: spread([row["metrics"][key] for row in own]) for title, key in _METRICS.items()}
        sizes = own[0]["scores"]
        for place, size in enumerate(sizes["size_bins"]):
            if sizes["objects_by_size"][place]:
                line[f"AP {size} px"] = spread([row["scores"]["box"]["ap_by_size"][place] for row in own])
        if all("blocks" in row for row in own):
            line["AP, all blocks off"] = spread([row["blocks"]["together"]["score"] for row in own])
        lines.append(line)
    return report.markdown(lines)


def write(stem: Path, command: str, plan: Recipe, rows: list[dict[str, Any]]) -> None:
    """Write the rows and their table."""
    text = (
        f"The recipe `{plan.name.rsplit('-', 2)[0]}` with other depthwise convolutions in its backbone: 3x3, 7x7, 7x7 "
        "under a learned Gaussian mask (GMConv), and a mixture of 3x3, 7x7 and 13x13 (MoRF, soft routing). Average "
        f"precision of boxes in percent on 500 val scenes after {plan.max_steps:,} steps of {plan.batch_size} scenes; "
        "mean ± standard deviation over the seeds. Objects are grouped by the square root of their visible area.\n\n"
    )
    publish(stem, command, {"recipe": dataclasses.asdict(plan), "rows": rows}, text + table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--designs", nargs="+", choices=list(DESIGNS), default=list(DESIGNS))
    parser.add_argument("--recipe", default="demo_scenes_faster_rcnn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/scenes_detection"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stem = args.out / "scenes_detection"
    stored = stem.with_suffix(".json")
    rows = json.loads(stored.read_text())["rows"] if stored.exists() else []
    plan = recipe("3x3", 0, args.runs, args.recipe)
    command = (
        f"python experiments/scenes_detection.py --recipe {args.recipe} --seeds {' '.join(map(str, args.seeds))} "
        f"--threads {args.threads}"
    )
    for seed in args.seeds:
        for name in args.designs:
            if any(row["design"] == name and row["seed"] == seed for row in rows):
                continue
            rows.append(measured(name, seed, args.runs, args.recipe))
            print(f"{name} seed {seed}: AP {100 * rows[-1]['metrics']['box_ap']:.1f} % "
                  f"in {rows[-1]['seconds']:.0f} s", flush=True)  # fmt: skip
            write(stem, command, plan, rows)
    write(stem, command, plan, rows)


if __name__ == "__main__":
    main()
