"""Does a fit's gain come from the kernel sizes, or from training in two phases?

nice python experiments/fit_control.py FIT... [--out experiments/results]

FIT is the folder of a finished fit. `widefield fit` trains the plain network in two phases, as a probe at all sizes
and then at the chosen ones, and the unchanged network in one. The control has the unchanged sizes and both phases: it
starts from the same probe. All three are compared on the report half. The files in --out are written after every fit,
and fits that are in them are not repeated. A control that was interrupted is continued.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from trials import started, trained

from widefield import data, report, tasks
from widefield._intervals import Interval, paired
from widefield.benchmarks.record import publish
from widefield.fitting import FitResult, halves
from widefield.fitting.read import Probed
from widefield.fitting.recipes import PLAIN, PROBE, UNCHANGED, plain_recipe
from widefield.fitting.verify import Measured, evaluate_half
from widefield.loading import load_trained

CONTROL = "control"
PAIRS = ((PLAIN, UNCHANGED), (CONTROL, UNCHANGED), (PLAIN, CONTROL))


def measured(folder: Path) -> dict[str, Any]:
    """Train the control of a fit, and return its row."""
    start = time.process_time()
    found = FitResult.load(folder)
    spec, groups, recipe = found.spec, found.groups, found.spec.recipe
    train_set, val_set = data.create_both(recipe.data.name, **recipe.data.args)
    task = tasks.create(recipe.task.name, train_set, **recipe.task.args)
    _, half = halves(val_set)
    weights = folder / f"{CONTROL}.safetensors"
    probed = Probed(load_trained(folder / PROBE, "last", "model"), groups, recipe, task, train_set)
    save_model(probed.plain(groups.unchanged), str(weights))
    plan = plain_recipe(spec, groups.unchanged, groups)
    plan = dataclasses.replace(
        plan, name=CONTROL, model=dataclasses.replace(plan.model, pretrained=str(weights)), trackers=[]
    )
    resumed = started(plan)
    trained(plan)
    runs = {PLAIN: found.verdict.plain.folder, UNCHANGED: found.verdict.unchanged.folder, CONTROL: CONTROL}
    each: dict[str, Measured] = {
        name: evaluate_half(load_trained(folder / run, "last"), half, task, spec) for name, run in runs.items()
    }
    differences: dict[str, Interval] = {
        f"{one} - {other}": paired(each[one].ratings, each[other].ratings, spec.seed) for one, other in PAIRS
    }
    return {
        "fit": recipe.name,
        "seed": recipe.seed,
        "settings": spec.to_dict(),
        "sizes": {group.name: [group.own, found.sizes[group.name]] for group in groups},
        "verdict": found.verdict.words,
        "headline": found.verdict.headline,
        "metrics": {name: one.metrics for name, one in each.items()},
        "differences": {name: dataclasses.asdict(one) for name, one in differences.items()},
        "cpu_seconds": None if resumed else round(time.process_time() - start, 1),
    }


def formatted(row: dict[str, Any]) -> dict[str, str]:
    """Return a row as text, with metrics and differences in percent."""
    changed = [f"{name}: {was} to {now}" for name, (was, now) in row["sizes"].items() if was != now]
    values = {name: f"{100 * found[row['headline']]:.1f}" for name, found in row["metrics"].items()}
    intervals = {
        name: f"{100 * found['mean']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"
        for name, found in row["differences"].items()
    }
    about = {"fit": row["fit"], "seed": str(row["seed"]), "sizes that changed": ", ".join(changed) or "none"}
    return {**about, **values, **intervals}


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows and their table."""
    text = (
        "Metric on the report half, %; differences of single images, with 95 % intervals over images. plain: chosen "
        "sizes, two phases. unchanged: own sizes, one phase. control: own sizes, two phases.\n\n"
    )
    rows.sort(key=lambda row: (row["fit"], row["seed"]))
    table = report.markdown([formatted(row) for row in rows])
    publish(out / "fit_control", "python experiments/fit_control.py FIT...", {"rows": rows}, text + table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fits", type=Path, nargs="+", metavar="FIT")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stored = args.out / "fit_control.json"
    for folder in args.fits:
        rows = json.loads(stored.read_text())["rows"] if stored.exists() else []
        recipe = FitResult.load(folder).spec.recipe
        if not any((row["fit"], row["seed"]) == (recipe.name, recipe.seed) for row in rows):
            rows.append(measured(folder))
            print(formatted(rows[-1]), flush=True)
        write(args.out, rows)


if __name__ == "__main__":
    main()
