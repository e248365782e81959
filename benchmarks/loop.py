"""Measure the overhead of the training loop: an epoch of `widefield train` against a bare loop, interleaved.

python benchmarks/loop.py [--repeats 5] [--out benchmarks/results]

Both train the same network from the same seed on the same batches of `scales`, with AdamW and a cosine schedule; the
bare loop does nothing else. Evaluation and checkpoint, which a bare loop has not, are left out of the engine's epoch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from widefield import data, report, tasks
from widefield.benchmarks.record import publish
from widefield.train import DataSpec, ModelSpec, OptimizerSpec, Recipe, create_model, engine, train
from widefield.train.loaders import batches, train_loader

RECIPES = {
    "convnext_atto, 64 px, batch 32": (ModelSpec("convnext_atto"), {"size": 64, "count": 960}, 32),
    "convnext_atto made narrow, 32 px, batch 16": (
        ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),
        {"size": 32, "count": 3200},
        16,
    ),
}


def ours(recipe: Recipe) -> float:
    """Return the seconds of an epoch's steps in the engine."""
    spent = []
    plain = engine._Run._train_epoch

    def timed(run: engine._Run) -> None:
        start = time.perf_counter()
        plain(run)
        spent.append(time.perf_counter() - start)

    with mock.patch.object(engine._Run, "_train_epoch", timed):
        train(recipe, console=Console(quiet=True))
    return spent[-1]


def bare(recipe: Recipe) -> float:
    """Return the seconds of the same steps in a bare loop."""
    torch.manual_seed(recipe.seed)
    dataset = data.create(recipe.data.name, "train", **recipe.data.args)
    task = tasks.create("classification", dataset)
    model = create_model(recipe.model, task.model_args)
    optimizer = create_optimizer_v2(model, "adamw", recipe.optimizer.lr, recipe.optimizer.weight_decay)
    loader = train_loader(dataset, task.collate, recipe.batch_size, 0, recipe.seed)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", recipe.epochs, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    model.train()
    spent, step = 0.0, 0
    for epoch in range(recipe.epochs):
        dataset.set_epoch(epoch)
        loader.sampler.set_epoch(epoch)
        start = time.perf_counter()
        for batch in batches(loader):
            task.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            scheduler.step_update(step)
        spent = time.perf_counter() - start
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rows, results = [], {}
    for name, (model, options, batch) in RECIPES.items():
        times: dict[str, list[float]] = {"bare": [], "widefield": []}
        for repeat in range(args.repeats):
            with tempfile.TemporaryDirectory() as output:
                recipe = Recipe(
                    name="loop",
                    model=model,
                    data=DataSpec("scales", options),
                    optimizer=OptimizerSpec(lr=1e-3),
                    output=output,
                    epochs=2,
                    batch_size=batch,
                    workers=0,
                )
                order = [("bare", bare), ("widefield", ours)]
                for label, run in order if repeat % 2 else order[::-1]:
                    times[label].append(run(recipe))
        ratio = statistics.median(b / o for b, o in zip(times["bare"], times["widefield"], strict=True))
        images = options["count"] // batch * batch
        results[name] = {"seconds": times, "images": images, "throughput_ratio": ratio}
        rate = {label: images / statistics.median(values) for label, values in times.items()}
        rows.append(
            {
                "recipe": name,
                "bare loop, images/s": f"{rate['bare']:.0f}",
                "widefield, images/s": f"{rate['widefield']:.0f}",
                "ratio (median of pairs)": f"{ratio:.3f}",
            }
        )
        print(" | ".join(rows[-1].values()), flush=True)
    command = f"python benchmarks/loop.py --repeats {args.repeats}"
    publish(
        args.out / "loop_cpu",
        command,
        {"results": results},
        f"Steps of the second epoch, with data loading, without evaluation and checkpoints.\n\n{report.markdown(rows)}",
    )


if __name__ == "__main__":
    main()
