"""Claims of three papers, in small, on photographs: mixtures, masks, and large kernels against single kernels.

nice python experiments/real_fields.py --fashion ROOT [--data fashion photos] [--groups mixtures masks large]
    [--seeds 0 1 2 3 4] [--runs RUNS] [--out experiments/results]

Two sets, both classification: `fashion`, 4,000 photographs of goods (Fashion-MNIST; ROOT is the folder of its files),
tested on 5,000 others; `photos`, crops of twelve photographs in gray, tested on other parts of them. The network: a
ConvNeXt, two blocks of width 32 at half the image's side and two of width 64 at a quarter. A design differs from the
others in its blocks' depthwise convolutions only. Each has its own learning rate: the best of 2e-3, 4e-3, 8e-3 and
further factors of 2 while the best is at an edge, with another seed, on the same test images.

- mixtures: MoRF (Lian, Yu, Wang 2024), tables 1 (against single kernels), 2c (attention) and 6 (where).
- masks: GMConv (Chen et al.), tables I and IV, figures 6 (initial sigma) and 7 (sigma by depth).
- large: RepLKNet (Ding et al. 2022), guidelines 2 (shortcut) and 3 (a small kernel beside the large one).

Rows are written after every run, and those that are there are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fashion_mnist  # noqa: F401  # registers the set
import timm
import torch
from timm.models import register_model
from torch import Tensor, nn
from trials import Row, Trials, short_recipe, slug, started, trained

from widefield import analysis, report
from widefield.train import ConversionSpec, DataSpec, GroupSpec, ModelSpec, Recipe, TaskSpec

BATCH, EPOCHS, IMAGES = 64, 10, 4000
EXPERTS = [3, 5, 7, 9, 11]
FIRST, LAST = "stages.0.blocks.*.conv_dw", "stages.1.blocks.*.conv_dw"
DATA = ("fashion", "photos")


@dataclasses.dataclass(frozen=True)
class Design:
    """What a design changes: size of the kernels, shortcuts, a conversion and where, and the rate of sigmas."""

    kernel_size: int = 7
    shortcut: bool = True
    kind: str | None = None
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: str = "*.conv_dw"
    sigma_rate: float = 1.0


def mixture(where: str = "*.conv_dw", **args: Any) -> Design:
    """Return mixtures of 3x3 to 11x11."""
    return Design(kind="morf", args={"kernel_sizes": EXPERTS, "init": "random", **args}, where=where)


def masked(kernel_size: int = 7, rate: float = 30.0, **args: Any) -> Design:
    """Return kernels under a mask whose sigma has its own learning rate."""
    return Design(kernel_size, kind="gmconv", args={"stem": "static", **args}, sigma_rate=rate)


def normed(kernel_size: int, small: int | None) -> Design:
    """Return kernels with a batch norm, and with a small kernel next to them unless ``small`` is None."""
    return Design(
        kernel_size, kind="large_kernel", args={"kernel_sizes": kernel_size, "small": small, "init": "random"}
    )


DESIGNS: Mapping[str, Mapping[str, Design]] = {
    "mixtures": {
        "3x3": Design(3),
        "5x5": Design(5),
        "7x7": Design(),
        "11x11": Design(11),
        "soft, none": mixture(),
        "soft, softmax": mixture(attention="softmax"),
        "soft, sigmoid": mixture(attention="sigmoid"),
        "hard": mixture(routing="hard"),
        "soft, first stage": mixture(FIRST),
        "soft, last stage": mixture(LAST),
    },
    "masks": {
        "7x7": Design(),
        "11x11": Design(11),
        "masked 7x7": masked(),
        "masked 7x7, one rate": masked(rate=1.0),
        "masked 7x7, sigma 2": masked(sigma=2.0),
        "masked 7x7, per image": masked(rate=1.0, body="dynamic", stem="dynamic"),
        "masked 11x11": masked(11),
    },
    "large": {
        "3x3": Design(3),
        "11x11": Design(11),
        "3x3, no shortcut": Design(3, shortcut=False),
        "11x11, no shortcut": Design(11, shortcut=False),
        "11x11, batch norm": normed(11, None),
        "11x11, batch norm and 3x3": normed(11, 3),
    },
}
BASE = {"mixtures": "7x7", "masks": "7x7", "large": "11x11"}
"""Group -> the design with which the others are compared."""
PAIRS = (
    ("soft, none", "soft, softmax"),
    ("soft, none", "soft, sigmoid"),
    ("soft, none", "hard"),
    ("soft, first stage", "soft, last stage"),
    ("masked 11x11", "11x11"),
    ("masked 7x7, per image", "masked 7x7, one rate"),
    ("11x11, no shortcut", "3x3, no shortcut"),
    ("11x11, batch norm and 3x3", "11x11, batch norm"),
)
"""Further designs to compare."""
EVERY = {name: design for group in DESIGNS.values() for name, design in group.items()}


class Nothing(nn.Module):
    """A shortcut that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@register_model
def fields_net(pretrained: bool = False, shortcut: bool = True, **options: Any) -> nn.Module:
    """Return the network, with PyTorch's own initialization: N(0, 0.02) is too little for so few channels."""
    shape: dict[str, Any] = {"stem_type": "overlap", "patch_size": 2, "depths": [2, 2, 0, 0], "dims": [32, 64, 64, 64]}
    model: nn.Module = timm.create_model("convnext_tiny", pretrained, **shape, **options)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not pretrained:
            layer.reset_parameters()
        if not shortcut and name.endswith("shortcut"):
            model.set_submodule(name, Nothing())
    return model


class Fields(Trials):
    """A row per set and design, whose name is "set: design"."""

    score, rates = "top1", (2e-3, 4e-3, 8e-3)
    command = "python experiments/real_fields.py --fashion ROOT"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args.out / "real_fields")
        self.args = args

    def recipe(self, name: str, lr: float, seed: int) -> Recipe:
        """Return the recipe of a run."""
        kind, _, title = name.partition(": ")
        design, steps = EVERY[title], IMAGES // BATCH
        sets = {
            "fashion": DataSpec(
                "fashion_mnist", {"root": str(self.args.fashion), "labels": IMAGES // 10, "limit": 5000, "seed": seed}
            ),
            "photos": DataSpec("photo_crops", {"size": 32, "count": IMAGES, "seed": seed}),
        }
        plan = short_recipe(
            slug(name, lr, seed), lr=lr, steps=EPOCHS * steps, warmup=steps, runs=self.args.runs, seed=seed,
            batch_size=BATCH, data=sets[kind], task=TaskSpec("classification"),
            model=ModelSpec("fields_net", {"kernel_sizes": design.kernel_size, "shortcut": design.shortcut}),
            conversion=ConversionSpec(design.kind, design.where, dict(design.args)) if design.kind else None,
        )  # fmt: skip
        if design.sigma_rate != 1:
            sigmas = GroupSpec("*sigma*", lr_scale=design.sigma_rate, weight_decay=0.0)
            plan = dataclasses.replace(plan, optimizer=dataclasses.replace(plan.optimizer, groups=[sigmas]))
        return plan

    def measured(self, name: str, lr: float, seed: int) -> Row:
        plan, start = self.recipe(name, lr, seed), time.process_time()
        resumed = started(plan)
        result = trained(plan)
        row: Row = {
            "top1": result.metrics["top1"],
            "cpu_s": None if resumed else round(time.process_time() - start, 1),
        }
        if plan.conversion and plan.conversion.kind == "gmconv":
            layers = analysis.masks(result.model).layers
            row["sigma"] = {layer.name: [round(float(value), 3) for value in layer.sigma] for layer in layers}
        return row

    def tables(self) -> str:
        parts = {
            f"{kind}-{group}": [
                self.line(f"{kind}: {title}", f"{kind}: {BASE[group]}") for title in designs
                if self.of(f"{kind}: {title}")
            ]
            for kind in DATA for group, designs in DESIGNS.items()
        }  # fmt: skip
        for kind in DATA:
            parts[f"{kind}-pairs"] = [
                {"design": first, "other": second, "difference": self.compared(*names)["minus"]}
                for first, second in PAIRS if all(map(self.of, names := (f"{kind}: {first}", f"{kind}: {second}")))
            ]  # fmt: skip
        parts["tuning"] = self.tuning()
        return "\n".join(
            f"{key}\n\n<!-- --8<-- [start:{key}] -->\n{report.markdown(lines)}<!-- --8<-- [end:{key}] -->\n"
            for key, lines in parts.items()
            if lines
        )

    def line(self, name: str, base: str) -> dict[str, str]:
        """Return the row of a design in the table of its group."""
        own, title = self.compared(name, base), base.partition(": ")[2]
        row = {
            "design": name.partition(": ")[2], "seeds": own["seeds"], "lr": own["lr"], "top-1": own["score"],
            f"minus {title}": own["minus"],
        }  # fmt: skip
        sigmas = [found["sigma"] for found in self.of(name) if "sigma" in found]
        if base.endswith(": 7x7") and any("sigma" in found for found in self.rows):
            means = [statistics.fmean(one[layer][0] for one in sigmas) for layer in (sigmas[0] if sigmas else ())]
            row["sigma by block"] = ", ".join(f"{mean:.2f}" for mean in means)
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, help="folder with the files of Fashion-MNIST")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--groups", nargs="+", choices=tuple(DESIGNS), default=list(DESIGNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("runs/real_fields"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if "fashion" in args.data and args.fashion is None:
        parser.error("--data fashion needs --fashion ROOT, the folder with the files of Fashion-MNIST.")
    torch.set_num_threads(1)
    trials = Fields(args)
    titles = dict.fromkeys(title for group in args.groups for title in DESIGNS[group])
    for kind in args.data:
        trials.run_all([f"{kind}: {title}" for title in titles], args.seeds)


if __name__ == "__main__":
    main()
