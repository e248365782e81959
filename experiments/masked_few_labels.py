"""Does masked pre-training help with few labels? Scratch against four methods and a control, on Fashion-MNIST.

python experiments/masked_few_labels.py ROOT [--seeds 0 1 2 3 4] [--processes 2] [--runs RUNS] [--out FOLDER]

ROOT is the folder with the four files of Fashion-MNIST (Xiao et al. 2017, MIT license), such as
``FashionMNIST/raw`` of ``torchvision.datasets.FashionMNIST(download=True)``, or that of the Debian package
``dataset-fashion-mnist``. First, the learning rate of each arm is chosen from a grid, with another seed and on train
images that are held out. ``--tune`` stops there. Finished units, which are an arm with a seed, are kept in RUNS and not
run again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from fashion_mnist import FashionMnist
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from trials import trained

from widefield import data, report, tasks
from widefield.benchmarks.record import publish
from widefield.dense import feature_maps
from widefield.tasks import Batch, MaskedImage
from widefield.train import DataSpec, ModelSpec, OptimizerSpec, Recipe, RunResult, ScheduleSpec, TaskSpec, create_model

PRE_STEPS, TUNE_STEPS, BATCH = 1000, 300, 64
LABELS = (10, 100)  # images of each class
PRE_LR = 3e-3
RATES = (5e-4, 1.5e-3, 5e-3)  # the grid of fine-tuning and training from scratch
PROBE_VAL = 2000  # images on which a pre-training is evaluated
TUNING_SEED = 100

NETWORK = {
    "patch_size": 1, "depths": [0, 1, 2, 1], "dims": [8, 24, 48, 96], "kernel_sizes": 3, "drop_path_rate": 0.0,
}  # fmt: skip
"""A ConvNeXt V2 with maps of stride 1, 2, 4 and 8, without blocks at stride 1."""

METHODS: Mapping[str, dict[str, Any]] = {
    "fcmae": {"method": "fcmae", "decoder_args": {"width": 96}},
    "spark": {"method": "spark", "decoder_args": {"width": 32, "norm": "layer"}, "out_indices": [1, 2, 3]},
    "simmim": {"method": "simmim"},
    "a2mim": {"method": "a2mim"},
    "shuffled": {"method": "fcmae", "decoder_args": {"width": 96}},
}
"""Arm -> arguments of its task; "shuffled" is the control."""
SCRATCH, LONG = "scratch", "scratch, equal total"
CONTROL = "shuffled"
BASES = (SCRATCH, LONG, CONTROL)  # what the others are compared with
ARMS = (LONG, *METHODS, SCRATCH)  # the slowest first
_WORDS = {CONTROL: "control (shuffled targets)"}


class ShuffledTargets(MaskedImage):
    """A control: predict the hidden patches of another image of the batch, about which the visible ones say nothing."""

    def losses(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        image = batch["image"]
        mask = self.method.mask.draw(len(image), *image.shape[2:])
        found: dict[str, Tensor] = model.losses(model.predict(image, mask), image.roll(1, 0), mask)
        return found


class Settings(NamedTuple):
    """What all units share."""

    root: str
    runs: Path
    rates: Mapping[str, float]  # "ARM LABELS" -> learning rate; empty: the whole grid
    held_out: bool = False


def _recipe(name: str, seed: int, settings: Settings, steps: int, rate: float, **parts: Any) -> Recipe:
    options = {"root": settings.root, "held_out": settings.held_out, "seed": seed, **parts.pop("data", {})}
    return Recipe(
        name=name, data=DataSpec("fashion_mnist", options), output=str(settings.runs), seed=seed,
        optimizer=OptimizerSpec(lr=rate, weight_decay=0.05), schedule=ScheduleSpec(warmup_steps=steps // 10),
        max_steps=steps, evaluate_every=steps, batch_size=BATCH, workers=0, channels_last=True, trackers=[], **parts,
    )  # fmt: skip


def _train(plan: Recipe) -> RunResult:
    shutil.rmtree(plan.folder, ignore_errors=True)  # of a unit that was interrupted
    return trained(plan)


def pre_trained(arm: str, seed: int, settings: Settings) -> tuple[Path, nn.Module, dict[str, Any]]:
    """Pre-train an encoder; return the folder of the run, its model, and a row."""
    name = "shuffled_targets" if arm == CONTROL else "masked_image"
    args = {"patch": 8, **METHODS[arm]}
    plan = _recipe(
        f"{arm}-{seed}", seed, settings, PRE_STEPS, PRE_LR, data={"limit": PROBE_VAL},
        model=ModelSpec("convnextv2_atto", dict(NETWORK)), task=TaskSpec(name, args),
    )  # fmt: skip
    result = _train(plan)
    row = {key: result.metrics[key] for key in ("train_loss", "loss", "knn_top1")}
    return plan.folder, result.model, {"kind": "pre-training", **row, **reconstructed(result.model, plan)}


@torch.no_grad()
def reconstructed(model: Any, plan: Recipe) -> dict[str, float]:
    """Return the loss of masked pixels, of the prediction and of the mean of every patch."""
    val = data.create("fashion_mnist", "val", **plan.data.args)
    images = torch.stack([val[i]["image"] for i in range(len(val))])
    mask = model.method.mask.draw(len(images), 32, 32, torch.Generator().manual_seed(0))
    means = F.interpolate(F.avg_pool2d(images, 8), scale_factor=8.0)
    guess = torch.zeros_like(images) if model.target.kind == "normalized_pixels" else means
    guesses = {"masked_loss": model.predict(images, mask), "mean_loss": guess}
    return {key: float(model.losses(y, images, mask)["reconstruction"]) for key, y in guesses.items()}


def probed(encoder: nn.Module, seed: int, settings: Settings) -> Iterable[dict[str, Any]]:
    """Fit a logistic regression to the means of the frozen encoder's last map; one row for each number of labels."""

    def features(split: str, labels: int | None) -> tuple[np.ndarray, list[int]]:
        options = {"root": settings.root, "held_out": settings.held_out, "seed": seed, "labels": labels}
        found: Any = data.create("fashion_mnist", split, **options)
        images = found._images[:, :, 2:34, 2:34].expand(-1, 3, -1, -1)
        with torch.no_grad():
            means = [encoder(part)[-1].mean((2, 3)) for part in images.split(500)]
        return torch.cat(means).numpy(), found._classes

    encoder.eval()
    x, y = features("val", None)
    for labels in LABELS:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
        probe.fit(*features("train", labels))
        yield {"kind": "probe", "labels": labels, "top1": float(probe.score(x, y))}


def tuned(
    arm: str, labels: int, seed: int, settings: Settings, rate: float, start: Path | None, steps: int
) -> dict[str, Any]:
    """Train a classifier on few labels, from a run or from scratch; return a row."""
    plan = _recipe(
        f"{arm}-{seed}-{labels}-{rate}".replace(", ", "-").replace(" ", "-"), seed, settings, steps, rate,
        data={"labels": labels}, task=TaskSpec("classification", {"label_smoothing": 0.1}),
        model=ModelSpec("convnextv2_atto", dict(NETWORK), pretrained=False if start is None else str(start)),
    )  # fmt: skip
    result = _train(plan)
    shutil.rmtree(plan.folder)
    return {"kind": "fine-tuning", "labels": labels, "lr": rate, "steps": steps, "top1": result.metrics["top1"]}


def measured(unit: tuple[str, int], settings: Settings) -> list[dict[str, Any]]:
    """Run an arm with a seed; return its rows, each with seconds of the clock and of the processor."""
    torch.set_num_threads(1)
    data.SETS["fashion_mnist"] = FashionMnist
    tasks.TASKS["shuffled_targets"] = ShuffledTargets
    arm, seed = unit
    rows: list[dict[str, Any]] = []
    clock, processor = time.perf_counter(), time.process_time()

    def add(row: Mapping[str, Any]) -> None:
        nonlocal clock, processor
        now, used = time.perf_counter(), time.process_time()
        spent = {"seconds": round(now - clock, 1), "processor_seconds": round(used - processor, 1)}
        rows.append({"arm": arm, "seed": seed, **row, **spent})
        clock, processor = now, used

    start = None
    if arm in METHODS:
        start, model, row = pre_trained(arm, seed, settings)
        add(row)
        for row in probed(model.encoder, seed, settings):
            add(row)
    elif arm == SCRATCH:
        torch.manual_seed(seed)
        network = create_model(ModelSpec("convnextv2_atto", dict(NETWORK)))
        for row in probed(feature_maps(network, levels=1, stage_norms="none"), seed, settings):
            add(row)
    steps = TUNE_STEPS + (PRE_STEPS if arm == LONG else 0)
    for labels in LABELS:
        rate = settings.rates.get(f"{arm} {labels}")
        for one in RATES if rate is None else (rate,):
            add(tuned(arm, labels, seed, settings, one, start, steps))
    return rows


def run(units: list[tuple[str, int]], settings: Settings, processes: int) -> list[dict[str, Any]]:
    """Run the units that have no rows yet, and return all rows."""
    settings.runs.mkdir(parents=True, exist_ok=True)
    log = settings.runs / "rows.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    left = [unit for unit in units if unit not in done]
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to be started; scikit-learn's too
    with multiprocessing.get_context("spawn").Pool(processes) as pool, log.open("a") as file:
        for found in pool.imap_unordered(functools.partial(measured, settings=settings), left):
            rows += found
            file.write("".join(f"{json.dumps(row)}\n" for row in found))  # a unit's rows at once
            file.flush()
            tops = ", ".join(f"{row['labels']} {100 * row['top1']:.1f} %" for row in found if "steps" in row)
            print(f"{found[0]['arm']} seed {found[0]['seed']}: {tops}", flush=True)
    return [row for row in rows if (row["arm"], row["seed"]) in units]


def best_rates(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the best learning rate of the grid for each arm and number of labels."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = f"{row['arm']} {row.get('labels')}"
        if row["kind"] == "fine-tuning" and row["top1"] > found.get(key, {"top1": -1})["top1"]:
            found[key] = row
    return {key: row["lr"] for key, row in found.items()}


def difference(rows: list[dict[str, Any]], arm: str, base: str, labels: int) -> tuple[float, float] | None:
    """Return mean and half of the 95 % interval of what an arm gains over another, paired by seed, in percent."""
    tops = {(r["arm"], r["seed"]): r["top1"] for r in rows if r["kind"] == "fine-tuning" and r["labels"] == labels}
    gains = [
        100 * (top - tops[base, seed]) for (name, seed), top in tops.items() if name == arm and (base, seed) in tops
    ]
    if arm == base or len(gains) < 2:
        return None
    spread = statistics.stdev(gains) / math.sqrt(len(gains))
    return statistics.fmean(gains), float(student.ppf(0.975, len(gains) - 1)) * spread


def table(rows: list[dict[str, Any]], labels: int) -> str:
    """Return the results with this many labels of each class."""
    lines = []
    for arm in (SCRATCH, LONG, *METHODS):
        line = {"arm": _WORDS.get(arm, arm)}
        for kind in ("fine-tuning", "probe"):
            tops = [r["top1"] for r in rows if (r["arm"], r["kind"], r.get("labels")) == (arm, kind, labels)]
            line["fine-tuned" if kind == "fine-tuning" else "linear probe"] = (
                f"{100 * statistics.fmean(tops):.1f}" if tops else ""
            )
        for base in BASES:
            found = difference(rows, arm, base, labels)
            line[f"against {_WORDS.get(base, base)}"] = "" if found is None else f"{found[0]:+.1f} ± {found[1]:.1f}"
        lines.append(line)
    return report.markdown(lines)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Return which arms are better or worse than others: those whose intervals do not hold 0."""
    sentences = []
    for labels in LABELS:
        for base in BASES:
            found: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
            for arm in METHODS:
                gain = difference(rows, arm, base, labels)
                if gain is not None:
                    word = "not told apart" if abs(gain[0]) <= gain[1] else "better" if gain[0] > 0 else "worse"
                    found[word].append(_WORDS.get(arm, arm))
            words = "; ".join(f"{word}: {', '.join(arms)}" for word, arms in found.items() if arms)
            sentences.append(f"- {labels} labels of a class, against {_WORDS.get(base, base)}: {words}.")
    return "\n".join(sentences) + "\n"


def losses(rows: list[dict[str, Any]]) -> str:
    """Return how each pre-training ended."""
    lines = []
    for arm in METHODS:
        own = [row for row in rows if row["arm"] == arm and row["kind"] == "pre-training"]
        if own:
            mean = {key: statistics.fmean(row[key] for row in own) for key in ("masked_loss", "mean_loss", "knn_top1")}
            lines.append({
                "pre-training": _WORDS.get(arm, arm), "loss at masked pixels": f"{mean['masked_loss']:.3f}",
                "that of patches' means": f"{mean['mean_loss']:.3f}",
                "ratio": f"{mean['masked_loss'] / mean['mean_loss']:.2f}", "k-NN": f"{100 * mean['knn_top1']:.1f}",
            })  # fmt: skip
    return report.markdown(lines)


def write(stem: Path, command: str, tuning: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Write the rows and their tables."""
    minutes, before = (sum(row["processor_seconds"] for row in part) / 60 for part in (rows, tuning))
    rates = best_rates(tuning)
    text = (
        f"Top-1 in percent on the 10,000 test images of Fashion-MNIST, each run evaluated once; "
        f"{len({row['seed'] for row in rows})} seeds, each with its own labeled images. {PRE_STEPS} steps of "
        f"pre-training on all 60,000 train images without labels, {TUNE_STEPS} steps of fine-tuning, {BATCH} images a "
        f'step; "{LONG}" trains {PRE_STEPS + TUNE_STEPS} steps on the labels. Differences are paired by seed, with '
        f"95 % intervals (Student's t). {minutes:.0f} minutes of processor time, and {before:.0f} for the learning "
        f"rates: the best of {', '.join(map(str, RATES))} for each arm and number of labels, with seed {TUNING_SEED} "
        f"and on 5,000 held-out train images; that of pre-training is {PRE_LR}.\n\n**Verdict**\n\n{verdict(rows)}\n"
    )
    text += "".join(f"**{labels} labeled images of each class**\n\n{table(rows, labels)}\n" for labels in LABELS)
    text += (
        f"**Pre-training.** Losses at masked pixels of {PROBE_VAL:,} test images at the end, and those of predicting "
        "the mean of every patch. k-NN: 20 neighbors among these images.\n\n" + losses(rows)
    )
    content = {"network": NETWORK, "methods": METHODS, "rates": rates, "tuning": tuning, "rows": rows}
    publish(stem, command, content, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/masked_few_labels"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    root = str(args.root.resolve())
    tuning = Settings(root, args.runs / "tuning", {}, held_out=True)
    tuned_rows = run([(arm, TUNING_SEED) for arm in args.arms], tuning, args.processes)
    if args.tune:
        return
    units = [(arm, seed) for seed in args.seeds for arm in args.arms]
    rows = run(units, Settings(root, args.runs, best_rates(tuned_rows)), args.processes)
    command = f"python experiments/masked_few_labels.py ROOT --seeds {' '.join(map(str, args.seeds))}"
    write(args.out / "masked_few_labels", command, tuned_rows, rows)


if __name__ == "__main__":
    main()
