"""Compare kernel designs in a small segmentation model on `scenes`: equal budget, several seeds, mIoU by object size.

nice python experiments/scenes.py [--seeds 0 1 2] [--designs 3x3 7x7 13x13 MoRF] [--out experiments/results]

Each row is one run of the recipe `demo_scenes` with another kernel. The files in --out are written after every row, and
rows that they hold already are not run again. An interrupted run in --runs is continued.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from trials import started, trained

from widefield import data, report
from widefield.analysis import BlockContributions, block_contributions
from widefield.benchmarks.record import publish
from widefield.train import ConversionSpec, Recipe, load_recipe

DESIGNS: dict[str, int | tuple[int, ...]] = {"3x3": 3, "7x7": 7, "13x13": 13, "MoRF": (3, 7, 13)}
"""Name -> the kernel size of all depthwise convolutions, or the sizes of the experts that each mixes (soft routing)."""
METRICS = ("miou", "miou_small", "miou_medium", "miou_large", "aacc")


def recipe(name: str, seed: int, runs: Path) -> Recipe:
    base = load_recipe("demo_scenes", ["--seed", str(seed), "--output", str(runs), "--trackers", "[]"])
    base = dataclasses.replace(base, name=f"{name.lower()}-{seed}")
    kernel = DESIGNS[name]
    if isinstance(kernel, int):
        args = {**base.model.args, "kernel_sizes": kernel}
        return dataclasses.replace(base, model=dataclasses.replace(base.model, args=args))
    options = {"kernel_sizes": list(kernel), "routing": "soft", "init": "random"}
    return dataclasses.replace(base, conversion=ConversionSpec("morf", "*.conv_dw", options))


def measured(name: str, seed: int, runs: Path) -> dict[str, Any]:
    """Train one model, and return its row."""
    plan = recipe(name, seed, runs)
    resumed, start = started(plan), time.perf_counter()
    result = trained(plan)
    return {
        "design": name,
        "seed": seed,
        "steps": result.steps,
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "seconds": time.perf_counter() - start,
        "resumed": resumed,
        "metrics": result.metrics,
        "blocks": contributions(plan, result.model).to_dict(),
    }


def contributions(plan: Recipe, model: torch.nn.Module) -> BlockContributions:
    """Return what each residual block contributes to the mIoU of 100 val scenes."""
    val = data.create(plan.data.name, "val", **plan.data.args)
    loader = DataLoader(Subset(val, range(min(100, len(val)))), batch_size=20, collate_fn=data.collate)
    found = block_contributions(model, [(batch["image"], batch["mask"]) for batch in loader], name=plan.name)
    print(found.line, flush=True)
    return found


def spread(values: list[float]) -> str:
    """Return mean and standard deviation in percent."""
    mean = 100 * statistics.fmean(values)
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for name in DESIGNS:
        own = [row for row in rows if row["design"] == name]
        if own:
            line = {"kernels": name, "parameters": f"{own[0]['parameters']:,}", "seeds": str(len(own))}
            lines.append(line | {metric: spread([row["metrics"][metric] for row in own]) for metric in METRICS})
            if all("blocks" in row for row in own):
                off = [row["blocks"]["together"]["score"] for row in own]
                lines[-1]["miou, all blocks off"] = spread(off)
    return report.markdown(lines)


def write(stem: Path, command: str, plan: Recipe, rows: list[dict[str, Any]]) -> None:
    """Write the rows and their table."""
    text = (
        "UPerNet on a narrow ConvNeXt (recipe `demo_scenes`); all depthwise convolutions have the row's kernel, and "
        f"MoRF mixes {', '.join(map(str, DESIGNS['MoRF']))}. Percent on 500 val scenes after {plan.max_steps:,} steps "
        f"of {plan.batch_size} scenes; mean ± standard deviation over the seeds. `miou_small` is of objects with a "
        "side below 1/8 of the image's, `miou_large` of those with at least 3/8.\n\n"
    )
    publish(stem, command, {"recipe": dataclasses.asdict(plan), "rows": rows}, text + table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--designs", nargs="+", choices=list(DESIGNS), default=list(DESIGNS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stem = args.out / "scenes"
    stored = stem.with_suffix(".json")
    rows = json.loads(stored.read_text())["rows"] if stored.exists() else []
    plan = recipe("3x3", 0, args.runs)
    command = f"python experiments/scenes.py --seeds {' '.join(map(str, args.seeds))} --threads {args.threads}"
    for seed in args.seeds:
        for name in args.designs:
            if any(row["design"] == name and row["seed"] == seed for row in rows):
                continue
            rows.append(measured(name, seed, args.runs))
            print(f"{name} seed {seed}: mIoU {100 * rows[-1]['metrics']['miou']:.1f} % "
                  f"in {rows[-1]['seconds']:.0f} s", flush=True)  # fmt: skip
            write(stem, command, plan, rows)
    write(stem, command, plan, rows)


if __name__ == "__main__":
    main()
