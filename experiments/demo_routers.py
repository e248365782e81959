"""Why do experts of the demo go unused, and why do its routers give all images the same weights?

python experiments/demo_routers.py [--recipe demo_digits] [--seeds 0 1]

Each row is one run of the demo's recipe with mixtures of 3, 5, 7, 9 and 11, and one thing changed. Routers are read on
the whole val split before and after training: dead experts, routers that give all images the same weights, how much
the weights vary over images, and how much the router's input does (root mean squared distance from the mean, relative
to the root mean square). Rows are written after every run, and those that are there are not run again.
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
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trials import trained

from widefield import data, report, tasks
from widefield.analysis import routing_weights
from widefield.benchmarks.record import publish
from widefield.nn import Router
from widefield.train import ConversionSpec, Recipe, build_model, load_recipe
from widefield.train.recipe import GroupSpec

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """Mixtures, and how they are trained; the first of a routing is the demo's."""

    mixture: dict[str, Any]
    layer_scale: float = 1e-6
    balance: float = 0.0
    router_lr: float = 1.0


VARIANTS = {
    "hard": Variant({"routing": "hard"}),
    "hard, layer scale 0.1": Variant({"routing": "hard"}, layer_scale=0.1),
    "hard, router lr x 10": Variant({"routing": "hard"}, router_lr=10.0),
    "hard, balance 0.01": Variant({"routing": "hard"}, balance=0.01),
    "hard, random": Variant({"routing": "hard", "init": "random"}),
    "soft": Variant({"routing": "soft"}),
    "soft, layer scale 0.1": Variant({"routing": "soft"}, layer_scale=0.1),
    "soft, random": Variant({"routing": "soft", "init": "random"}),
    "softmax": Variant({"attention": "softmax"}),
    "softmax, random": Variant({"attention": "softmax", "init": "random"}),
    "softmax, router lr x 10": Variant({"attention": "softmax"}, router_lr=10.0),
}


def planned(name: str, seed: int, args: argparse.Namespace) -> Recipe:
    """Return the recipe of a run."""
    variant, keys = VARIANTS[name], {"seed": seed, "output": args.runs, "trackers": "[]"}
    keys["model.args.ls_init_value"] = variant.layer_scale
    plan = load_recipe(args.recipe, [str(word) for key, value in keys.items() for word in (f"--{key}", value)])
    groups = [GroupSpec("*.router.*", variant.router_lr)] if variant.router_lr != 1 else []
    title = "".join(letter if letter.isalnum() else "-" for letter in name)
    return dataclasses.replace(
        plan,
        name=f"{args.recipe}-{title}-{seed}",
        conversion=ConversionSpec("morf", "*.conv_dw", variant.mixture),
        optimizer=dataclasses.replace(plan.optimizer, groups=groups),
        balance=variant.balance,
    )


def read(model: nn.Module, images: Tensor) -> Row:
    """Return statistics of the routers, each a list over the mixtures."""
    pooled: dict[nn.Module, list[Tensor]] = {}
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [
        router.register_forward_pre_hook(lambda own, given: pooled.setdefault(own, []).append(given[0].mean((2, 3))))
        for router in routers
    ]
    blocks = routing_weights(model.eval(), images, batch_size=250)
    for hook in hooks:
        hook.remove()
    inputs = [torch.cat(pooled[router]) for router in routers]
    return {
        "dead": [len(block.dead()) for block in blocks],
        "constant": [not block.depends_on_input for block in blocks],
        "variation": [round(block.variation(), 4) for block in blocks],
        "input": [round(float((x - x.mean(0)).square().mean().sqrt() / x.square().mean().sqrt()), 4) for x in inputs],
        "chosen": [block.frequencies().round(3).tolist() for block in blocks],
    }


def measured(name: str, seed: int, args: argparse.Namespace) -> Row:
    """Run one variant, and return its row."""
    plan = planned(name, seed, args)
    validation = data.create(plan.data.name, "val", **plan.data.args)
    images = torch.cat([batch["image"] for batch in DataLoader(validation, batch_size=250, collate_fn=data.collate)])
    torch.manual_seed(seed)
    task = tasks.create(plan.task.name, validation, **plan.task.args)
    before = read(build_model(plan, task, validation.classes), images)
    started = time.process_time()
    result = trained(plan)
    seconds = round(time.process_time() - started, 1)
    after = read(result.model, images)
    return {
        "recipe": args.recipe, "variant": name, "seed": seed, "cpu_s": seconds,
        "top1": result.metrics["top1"], "before": before, "after": after,
    }  # fmt: skip


def table(rows: list[Row]) -> str:
    """Return a row per recipe and variant, as Markdown."""
    lines = []
    for key in dict.fromkeys((row["recipe"], row["variant"]) for row in rows):
        own = [row for row in rows if (row["recipe"], row["variant"]) == key]

        def over(when: str, what: str, own: list[Row] = own) -> list[float]:
            return [value for row in own for value in row[when][what]]

        mixtures = len(over("after", "dead"))
        experts = len(own[0]["after"]["chosen"][0])
        lines.append({
            "recipe": key[0], "mixtures": key[1], "seeds": str(len(own)),
            "top-1, %": f"{100 * statistics.fmean(row['top1'] for row in own):.1f}",
            "dead experts, start": f"{sum(over('before', 'dead'))} of {mixtures * experts}",
            "end": f"{sum(over('after', 'dead'))} of {mixtures * experts}",
            "same weights for all images, start": f"{sum(over('before', 'constant'))} of {mixtures}",
            "end ": f"{sum(over('after', 'constant'))} of {mixtures}",
            "variation of weights, end": f"{statistics.median(over('after', 'variation')):.3f}",
            "of the router's input, start": f"{statistics.median(over('before', 'input')):.3f}",
            "end  ": f"{statistics.median(over('after', 'input')):.3f}",
        })  # fmt: skip
    # A page of the docs includes only the text between these markers.
    return f"<!-- --8<-- [start:routers] -->\n{report.markdown(lines)}<!-- --8<-- [end:routers] -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo_digits", choices=("demo_digits", "demo_scales"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo_routers"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stem = args.out / "demo_routers"
    stored = stem.with_suffix(".json")
    rows = json.loads(stored.read_text())["rows"] if stored.exists() else []
    command = f"python experiments/demo_routers.py --seeds {' '.join(map(str, args.seeds))}"
    for seed in args.seeds:
        for name in args.variants:
            if any((row["recipe"], row["variant"], row["seed"]) == (args.recipe, name, seed) for row in rows):
                continue
            rows.append(measured(name, seed, args))
            print(json.dumps(rows[-1]), flush=True)
            publish(stem, command, {"rows": rows}, table(rows))


if __name__ == "__main__":
    main()
