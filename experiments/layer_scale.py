"""How much do the blocks of the small recipes contribute, by the first value of layer scale and the learning rate?

nice python experiments/layer_scale.py RECIPE [--layer-scale 1e-6 0.1 null] [--lr 3e-3] [--designs 7x7 "MoRF soft"]
    [--seeds 0 1 2] [--out experiments/results]

Each row is one run of `demo_digits` or `demo_scales`. Its blocks are then switched off, one at a time and all at once,
on the whole val split. The files in --out are written after every row. Rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from trials import started, trained

from widefield import data, report
from widefield.analysis import block_contributions
from widefield.benchmarks.record import publish
from widefield.train import ConversionSpec, Recipe, load_recipe

DESIGNS: dict[str, str] = {"7x7": "", "MoRF soft": "soft", "MoRF hard": "hard"}
"""Name -> routing of the mixtures; "" for plain kernels."""


def recipe(base: str, design: str, scale: str, lr: str, seed: int, runs: str) -> Recipe:
    keys = {"model.args.ls_init_value": scale, "optimizer.lr": lr, "seed": str(seed), "output": runs, "trackers": "[]"}
    name = f"{base}-{design.lower().replace(' ', '-')}-{scale}-{lr}-{seed}"
    plan = load_recipe(base, [word for key, value in keys.items() for word in (f"--{key}", value)])
    conversion = ConversionSpec("morf", "*.conv_dw", {"routing": DESIGNS[design]}) if DESIGNS[design] else None
    return dataclasses.replace(plan, name=name, conversion=conversion)


def measured(plan: Recipe) -> dict[str, Any]:
    """Train one model, switch its blocks off, and return its row."""
    start = time.process_time()
    resumed = started(plan)
    result = trained(plan)
    seconds = time.process_time() - start
    validation = data.create(plan.data.name, "val", **plan.data.args)
    loader = DataLoader(validation, batch_size=250, collate_fn=data.collate)
    pairs = [(batch["image"], batch["label"]) for batch in loader]  # the masks of scales are no labels
    found = block_contributions(result.model.cpu(), pairs)
    return {
        "top1": found.score,
        "without": {block.name: block.score for block in found.blocks},
        "without_all": found.together.score,
        "cpu_seconds": None if resumed else round(seconds, 1),
    }


def spread(values: list[float]) -> str:
    """Return mean and standard deviation in percent."""
    mean = 100 * statistics.fmean(values)
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    keys = ("recipe", "kernels", "layer scale", "lr")
    for group in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        own = [row for row in rows if tuple(row[key] for key in keys) == group]
        drops = [[row["top1"] - score for score in row["without"].values()] for row in own]
        lines.append(
            dict(zip(keys, group, strict=True))
            | {"seeds": str(len(own)), "top-1, %": spread([row["top1"] for row in own])}
            | {"all blocks off": spread([row["without_all"] for row in own])}
            | {"points lost without one block": f"{100 * min(map(min, drops)):.1f} to {100 * max(map(max, drops)):.1f}"}
        )
    return report.markdown(lines)


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows and their table."""
    rows.sort(key=lambda row: (row["recipe"], row["kernels"] != "7x7", row["kernels"], row["layer scale"], row["lr"]))
    text = (
        "One row per recipe, kernels, first value of layer scale (null: none) and learning rate; all else as in the "
        "recipe. Mean ± standard deviation over the seeds. The last column is over all blocks and seeds. Chance is "
        "10 % on digits and 12.5 % on scales.\n\n"
    )
    publish(out / "layer_scale", "python experiments/layer_scale.py RECIPE", {"rows": rows}, text + table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=("demo_digits", "demo_scales"))
    parser.add_argument("--layer-scale", nargs="+", default=["1e-6", "0.1", "null"])
    parser.add_argument("--lr", nargs="+")
    parser.add_argument("--designs", nargs="+", choices=list(DESIGNS), default=list(DESIGNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", default="runs/layer_scale")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stored = args.out / "layer_scale.json"
    rates = args.lr or [f"{load_recipe(args.recipe).optimizer.lr:g}"]
    for seed, lr, scale, design in itertools.product(args.seeds, rates, args.layer_scale, args.designs):
        rows = json.loads(stored.read_text())["rows"] if stored.exists() else []
        place = {"recipe": args.recipe, "kernels": design, "layer scale": scale, "lr": lr, "seed": seed}
        if not any(place.items() <= row.items() for row in rows):
            row = place | measured(recipe(args.recipe, design, scale, lr, seed, args.runs))
            rows.append(row)
            print(row, flush=True)
        write(args.out, rows)


if __name__ == "__main__":
    main()
