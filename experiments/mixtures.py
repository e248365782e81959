"""What makes mixtures train well? Mixtures of kernel sizes against single kernels, controls, and one change at a time.

python experiments/mixtures.py [--designs 7x7 3x3 11x11 softmax none ...] [--seeds 0 1 2 3 4] [--latency]

Images, labels and network are those of `shapes.py`, with objects of 6 to 42 pixels; the depthwise convolutions differ.
Single kernels and the mixtures `softmax` and `none` each train at their own best learning rate: of 4e-3, 8e-3, 16e-3
and further factors of 2 while the best is at an edge, by the score of seed 100, which is not reported. All others
train at the rate of the design from which they differ by one change. Scores are those of 1,000 test images that no
run saw. The seed sets weights, data and test images, and differences are paired by it.

Rows are written to --out after every run, and those that it holds are not run again. Interrupted runs continue.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from mixture_layers import NormedExperts, WithBranch
from shapes import BATCH, BLOCKS, SETS, TESTED, Shapes, base
from torch import Tensor, nn
from trials import Row, Trials, slug, trained

import widefield
from widefield import bench, data, report, tasks
from widefield.analysis import block_contributions, routing_weights
from widefield.loading import load_trained
from widefield.runs import evaluate_model
from widefield.train import ConversionSpec, Recipe
from widefield.train.recipe import GroupSpec

SIZES = (3, 7, 11)
QUARTERS = ("smallest", "second", "third", "largest")


@dataclasses.dataclass(frozen=True)
class Design:
    """Depthwise convolutions of the network, and how they are trained.

    Attributes:
        kind, args: of the conversion.
        kernel_size: of the network before it.
        groups: parameters with rates of their own.
        like: the design whose learning rate it takes; "": its own best.
        epochs: relative to the others.
        data: "mixed", or "aligned": the same images with one contrast, see :class:`Aligned`.
    """

    kind: str
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    kernel_size: int = 7
    groups: list[GroupSpec] = dataclasses.field(default_factory=list)
    like: str = ""
    epochs: float = 1.0
    data: str = "mixed"


def mixture(attention: str, sizes: tuple[int, ...] = SIZES, like: str = "") -> Design:
    """Return a design of mixtures; "hard" in place of an attention is hard routing."""
    how = {"routing": "hard"} if attention == "hard" else {"attention": attention}
    return Design("morf", {"kernel_sizes": list(sizes), "init": "random", **how}, like=like)


SINGLE = {f"{size}x{size}": Design("fast_depthwise", kernel_size=size) for size in SIZES}
MIXTURES = {"softmax": mixture("softmax"), "none": mixture("none"), "hard": mixture("hard", like="none")}
CONTROLS = {
    "none 7": mixture("none", (7,), like="none"),
    "none 7-7-7": mixture("none", (7, 7, 7), like="none"),
    "softmax 7-7-7": mixture("softmax", (7, 7, 7), like="softmax"),
    "constants 3-7-11": Design("constants", {"kernel_sizes": list(SIZES)}, like="softmax"),
    "7x7 and SE": Design("excited", like="7x7"),
    "7x7, 1.5 x epochs": Design("fast_depthwise", like="7x7", epochs=1.5),
}


ALIGNED = {
    f"aligned: {name}": dataclasses.replace(design, like=name, data="aligned")
    for name, design in {**SINGLE, **MIXTURES, **CONTROLS}.items()
}


def changes(attention: str, images: int) -> dict[str, Design]:
    """Return the designs with one change to the mixture with this attention."""
    plain = dataclasses.replace(MIXTURES[attention], like=attention)
    options = {"kernel_sizes": list(SIZES), "attention": attention, "steps": images // BATCH}

    def changed(change: str) -> Design:
        return Design("changed", {"change": change, **options}, like=attention)

    def grouped(*groups: GroupSpec) -> Design:
        return dataclasses.replace(plain, groups=list(groups))

    by_size = [GroupSpec(f"*.expert_weights.{index}", 7 / size) for index, size in enumerate(SIZES)]
    found = {
        "weights kept": dataclasses.replace(plain, args={**plain.args, "init": "preserve"}),
        "norm": changed("norm"),
        "norm+std": changed("norm+std"),
        "router lr x 0.1": grouped(GroupSpec("*.router.*", 0.1)),
        "router lr x 10": grouped(GroupSpec("*.router.*", 10.0)),
        "router without decay": grouped(GroupSpec("*.router.*", weight_decay=0.0)),
        "scale": changed("scale"),
        "expert norms": changed("expert norms"),
        "branch": changed("branch"),
        "warm-up": changed("warm-up"),
        "annealed": changed("annealed"),
        "shares": changed("shares"),
        "lr by size": grouped(*by_size),
        "std": changed("std"),
    }
    left_out = {"softmax": ("shares",), "none": ("annealed",)}[attention]
    return {f"{attention}, {name}": design for name, design in found.items() if name not in left_out}


class Aligned(Shapes):
    """The same images in gray, with the same contrast: 0 is the background's mean, and 1 the object's.

    The colors of `scales` are random, so that a router can see in which direction an object differs from its
    background. Here all objects are bright.
    """

    def sample(self, index: int) -> data.Sample:
        """Return a sample of :class:`Shapes` with another image."""
        found = super().sample(index)
        image, inside = found["image"], found["mask"] > 0
        background = image[:, ~inside].mean(1)
        contrast = image[:, inside].mean(1) - background
        gray = torch.einsum("chw,c->hw", image - background[:, None, None], contrast / contrast.square().sum())
        return {**found, "image": gray.expand(3, -1, -1).clone()}


data.catalog.SETS["aligned"] = Aligned


class Quarters(Shapes):
    """`Shapes` with the quarter of the objects' sizes to which each object belongs."""

    size_groups = QUARTERS

    def __init__(self, split: str, **options: Any) -> None:
        super().__init__(split, **options)
        self.limits = self._sizes.quantile(torch.tensor([0.25, 0.5, 0.75]))

    def sample(self, index: int) -> data.Sample:
        """Return a sample of :class:`Shapes` with ``size_group`` uint8 (size, size), 255 where there is no object."""
        found = super().sample(index)
        quarter = int(torch.bucketize(found["size"], self.limits))
        return {**found, "size_group": torch.where(found["mask"] > 0, quarter, 255).to(torch.uint8)}


class AlignedQuarters(Quarters, Aligned):
    """`Aligned` with the quarter of the objects' sizes."""


def tested_on(design: Design, seed: int) -> Quarters:
    """Return the test images of a design."""
    kind = AlignedQuarters if design.data == "aligned" else Quarters
    return kind("val", **{"size": 48, **SETS["mixed"][1], "count": TESTED, "seed": 1000 + seed})


def planned(name: str, design: Design, lr: float, seed: int, args: argparse.Namespace) -> Recipe:
    """Return the recipe of a run."""
    epochs = round(design.epochs * args.epochs)
    plan = base("mixed", seed, images=args.images, epochs=epochs, lr=lr, runs=args.runs)
    return dataclasses.replace(
        plan,
        name=slug(name, lr, seed),
        model=dataclasses.replace(plan.model, args={**plan.model.args, "kernel_sizes": design.kernel_size}),
        data=dataclasses.replace(plan.data, name="aligned") if design.data == "aligned" else plan.data,
        optimizer=dataclasses.replace(plan.optimizer, groups=design.groups),
        conversion=ConversionSpec(design.kind, "*.conv_dw", design.args),
    )


def folded(model: nn.Module) -> nn.Module:
    """Replace the experiment's branches and norms by the mixtures that compute the same, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, WithBranch | NormedExperts):
            model.set_submodule(name, module.fused())
    return model


def ranks(values: Tensor) -> Tensor:
    """Return ranks; ties share their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()


def routed(model: nn.Module, test: Quarters) -> list[Row]:
    """Return how each mixture weighs its experts on the test images; empty for a network without mixtures."""
    if not any(hasattr(module, "router") for module in model.modules()):
        return []
    images = torch.stack([test.sample(index)["image"] for index in range(len(test))])
    found = []
    for block in routing_weights(model, images, batch_size=250):
        fields = torch.from_numpy(block.fields()).float()
        varies = fields.std() > 0
        rank = torch.corrcoef(torch.stack([ranks(fields), ranks(test._sizes)]))[0, 1] if varies else torch.tensor(0.0)
        found.append(
            {"block": block.name, "weights": block.mean().round(3).tolist(), "std": block.std().round(3).tolist(),
             "dead": len(block.dead()), "constant": not block.depends_on_input, "rank": round(float(rank), 3)}
        )  # fmt: skip
    return found


class Results(Trials):
    """The rows, what routing weights follow, and latencies."""

    score, rates = "miou", (4e-3, 8e-3, 16e-3)

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args.out / "mixtures", latency={}, followed=[])
        self.args = args
        self.command = f"python experiments/mixtures.py --images {args.images} --epochs {args.epochs}"
        self.designs = {
            **DESIGNS, **ALIGNED, **changes("softmax", args.images), **changes("none", args.images)
        }  # fmt: skip

    def tuned_as(self, name: str) -> str:
        like = self.designs[name].like
        return self.tuned_as(like) if like else name

    def measured(self, name: str, lr: float, seed: int) -> Row:
        design, start = self.designs[name], time.process_time()
        model = trained(planned(name, design, lr, seed, self.args)).model
        seconds = time.process_time() - start
        test = tested_on(design, seed)
        task = tasks.create("segmentation", test, model="fcn")
        metrics = evaluate_model(model, test, task, batch_size=125, workers=0).metrics
        samples = [test.sample(index) for index in range(500)]
        batches = [
            {key: torch.stack([sample[key] for sample in samples[start : start + 125]]) for key in ("image", "mask")}
            for start in range(0, len(samples), 125)
        ]
        blocks = block_contributions(model, batches)
        return {
            "images": self.args.images, "epochs": round(design.epochs * self.args.epochs), "cpu_s": round(seconds, 1),
            "miou": metrics["miou"], "by_size": [metrics[f"miou_{q}"] for q in QUARTERS], "loss": metrics["loss"],
            "points_of_blocks": [round(blocks.drop(block) or 0.0, 1) for block in blocks.blocks],
            "routing": routed(model, test),
        }  # fmt: skip

    def tables(self) -> str:
        """Return scores of the designs, of the changes, of the tuning runs, and how routers weigh, as Markdown."""
        single = [name for name in SINGLE if self.of(name)]
        best = max(single, key=lambda name: statistics.fmean(self.scores(name).values()), default="")
        names = [name for name in dict.fromkeys([*DESIGNS, *(row["design"] for row in self.rows)]) if self.of(name)]
        aligned = [name for name in names if name in ALIGNED]
        others = [name for name in names if name not in {**DESIGNS, **ALIGNED}]
        parts = {
            "designs": ("Designs", [self.line(name, best) for name in names if name in DESIGNS]),
            "aligned": ("Images of one contrast", [self.line(name, "aligned: 7x7") for name in aligned]),
            "changes": ("One change at a time", [self.line(name, name.partition(",")[0]) for name in others]),
            "tuning": ("Tuning runs, one seed", self.tuning()),
            "routers": ("Routers", routers(self)),
            "followed": ("What routing weights follow, share of their variance", self.notes["followed"]),
        }
        # A page of the docs includes only the text between these markers.
        return "\n".join(
            f"## {title}\n\n<!-- --8<-- [start:{key}] -->\n{report.markdown(lines)}<!-- --8<-- [end:{key}] -->\n"
            for key, (title, lines) in parts.items()
            if lines
        )

    def line(self, name: str, base: str) -> dict[str, str]:
        """Return the row of a design, compared with another one; a change, with the mixture that it changes."""
        rows, own = self.of(name), self.compared(name, base)
        quarters = [statistics.fmean(values) for values in zip(*(row["by_size"] for row in rows), strict=True)]
        against = base if name in DESIGNS or name in ALIGNED else "unchanged"
        latency = self.notes["latency"].get(name)
        found = {
            "design": name, "seeds": own["seeds"], "lr": own["lr"], "mIoU": own["score"],
            f"minus {against}": own["minus"],
            "mIoU by size": " / ".join(f"{100 * value:.0f}" for value in quarters),
            "training, CPU s": f"{statistics.fmean(row['cpu_s'] for row in rows):.0f}",
        }  # fmt: skip
        return {**found, "latency, ms": f"{1e3 * latency['p50']:.2f}"} if latency else found


DESIGNS = {**SINGLE, **MIXTURES, **CONTROLS}


def routers(results: Results) -> list[dict[str, str]]:
    """Return a row per design and block, of the first seed."""
    lines = []
    for name in dict.fromkeys(row["design"] for row in results.rows if row["routing"]):
        rows = results.of(name)
        for index in range(BLOCKS if rows else 0):
            own = [row["routing"][index] for row in rows]
            lines.append({
                "design": name, "block": str(index), "seeds": str(len(own)),
                "mean weights, first seed": " ".join(f"{value:.2f}" for value in own[0]["weights"]),
                "their std over images": " ".join(f"{value:.2f}" for value in own[0]["std"]),
                "rank correlation with size, all seeds": " ".join(f"{one['rank']:.2f}" for one in own),
                "dead experts": str(sum(one["dead"] for one in own)),
                "same weights for all images": str(sum(one["constant"] for one in own)),
            })  # fmt: skip
    return lines


def explained(values: Tensor, causes: Tensor) -> float:
    """Return the share of the variance of values (N, n) that a quadratic function of causes (N, k) explains."""
    causes = (causes - causes.mean(0)) / causes.std(0).clamp(min=1e-3)
    squares = (causes[:, :, None] * causes[:, None, :]).flatten(1)
    design = torch.cat([torch.ones(len(causes), 1), causes, squares], 1).double()
    rest = values - design @ torch.linalg.lstsq(design, values, driver="gelsd").solution
    return float(1 - rest.square().sum() / (values - values.mean(0)).square().sum())


def follow(results: Results) -> None:
    """Say what the routing weights of each mixture's first seed depend on: background, contrast or size of the object.

    Contrast is the mean color of the object minus that of the background.
    """
    followed, designs = [], {**DESIGNS, **ALIGNED}
    for name in (name for name, design in designs.items() if design.kind == "morf" and results.of(name)):
        row = results.of(name)[0]
        plan = planned(name, designs[name], row["lr"], row["seed"], results.args)
        test = tested_on(designs[name], row["seed"])
        samples = [test.sample(index) for index in range(len(test))]
        images = torch.stack([sample["image"] for sample in samples])
        inside = torch.stack([sample["mask"] for sample in samples])[:, None] > 0
        colors = [(images * part).sum((2, 3)) / part.sum((2, 3)) for part in (~inside, inside)]
        causes = {"background": colors[0], "contrast": colors[1] - colors[0], "size": test._sizes.log()[:, None]}
        for index, block in enumerate(routing_weights(load_trained(plan.folder, "last"), images, batch_size=250)):
            weights = torch.from_numpy(block.weights).double()
            shares = {cause: f"{explained(weights, values):.2f}" for cause, values in causes.items()}
            negative = " ".join(f"{value:.2f}" for value in (weights < 0).double().mean(0).tolist())
            followed.append({"design": name, "block": str(index), **shares, "images with a negative weight": negative})
    results.notes["followed"] = followed
    results.write()


def deployed(name: str, results: Results, x: Tensor) -> nn.Module:
    """Return the trained network of a design's first seed as it is deployed."""
    row, design = results.of(name)[0], DESIGNS[name]
    model = load_trained(planned(name, design, row["lr"], row["seed"], results.args).folder, "last").eval()
    if design.kind == "fast_depthwise":
        return model
    model = widefield.reparameterize(model, x)
    if design.kind == "morf":
        return model
    return widefield.convert(model, widefield.FastDepthwise(), "*.conv_dw*", inplace=True)  # it is torch's own now


def timed(results: Results) -> None:
    """Measure the latency of each design on one image, interleaved."""
    x = torch.randn(1, 3, 48, 48)
    models = {name: deployed(name, results, x) for name in DESIGNS if results.of(name)}
    calls = {name: functools.partial(model, x) for name, model in models.items()}
    with torch.inference_mode():
        found = bench.measure(calls, repeats=41, warmup=3, shortest_s=0.02)
    print(found)
    results.notes["latency"] = {name: row.to_dict() for name, row in found.items()}
    results.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--designs", nargs="+", help="default: all; 'softmax,' and 'none,': their changes")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--latency", action="store_true", help="of finished runs: measure latency, read routers")
    parser.add_argument("--runs", type=Path, default=Path("runs/mixtures"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args)
    if args.latency:
        timed(results)
        follow(results)
        return
    chosen = args.designs or list(results.designs)
    unknown = [name for name in chosen if name not in results.designs]
    if unknown:
        parser.error(f"unknown designs {unknown}; there are {', '.join(map(repr, results.designs))}")
    results.run_all(chosen, args.seeds)


if __name__ == "__main__":
    main()
