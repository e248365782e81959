"""Claims of three papers, in small, on photographs: mixtures, masks, and large kernels against single kernels.

nice python experiments/real_fields.py --fashion ROOT [--data fashion photos] [--groups mixtures masks large]
    [--seeds 0 1 2 3 4] [--runs RUNS] [--out experiments/results]

Two sets, both classification: `fashion`, 4,000 photographs of goods (Fashion-MNIST; ROOT is the folder of its files),
tested on 5,000 others; `photos`, crops of twelve photographs in gray, tested on other parts of them. The network: a
ConvNeXt, two blocks of width 32 at half the image's side and two of width 64 at a quarter. A design
differs from the others in its blocks' depthwise convolutions only. It is trained at each of three learning rates with
another seed, and then with all seeds at the best of them.

- mixtures: MoRF (Lian, Yu, Wang 2024), tables 1 (against single kernels), 2c (attention) and 6 (where).
- masks: GMConv (Chen et al.), tables I and IV, figures 6 (initial sigma) and 7 (sigma by depth).
- large: RepLKNet (Ding et al. 2022), guidelines 2 (shortcut) and 3 (a small kernel beside the large one).

Rows are written after every run, and those that are there are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fashion_mnist  # noqa: F401  # registers the set
import timm
import torch
from shapes import QUIET, spread
from timm.models import register_model
from torch import Tensor, nn

from widefield import analysis, report
from widefield.benchmarks.record import publish
from widefield.train import (
    ConversionSpec,
    DataSpec,
    GroupSpec,
    ModelSpec,
    OptimizerSpec,
    Recipe,
    ScheduleSpec,
    TaskSpec,
    train,
)

RATES = (2e-3, 4e-3, 8e-3)
TUNING = 100
"""Seed with which rates are compared."""
BATCH, EPOCHS = 64, 10
EXPERTS = [3, 5, 7, 9, 11]
FIRST, LAST = "stages.0.blocks.*.conv_dw", "stages.1.blocks.*.conv_dw"


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


def recipe(kind: str, name: str, rate: float, seed: int, args: argparse.Namespace) -> Recipe:
    """Return the recipe of a design."""
    design = EVERY[name]
    sets = {
        "fashion": DataSpec("fashion_mnist", {"root": str(args.fashion), "labels": 400, "limit": 5000, "seed": seed}),
        "photos": DataSpec("photo_crops", {"size": 32, "count": 4000, "seed": seed}),
    }
    steps = 4000 // BATCH
    own = [GroupSpec("*sigma*", lr_scale=design.sigma_rate, weight_decay=0.0)] if design.sigma_rate != 1 else []
    slug = f"{kind}-{name}-{rate:g}-{seed}".replace(" ", "-").replace(",", "")
    return Recipe(
        name=slug,
        model=ModelSpec("fields_net", {"kernel_sizes": design.kernel_size, "shortcut": design.shortcut}),
        data=sets[kind],
        task=TaskSpec("classification"),
        conversion=ConversionSpec(design.kind, design.where, dict(design.args)) if design.kind else None,
        output=str(args.runs),
        optimizer=OptimizerSpec("adamw", lr=rate, weight_decay=0.05, groups=own),
        schedule=ScheduleSpec("cosine", warmup_steps=steps),
        max_steps=EPOCHS * steps,
        batch_size=BATCH,
        workers=0,
        clip_grad=5.0,
        log_every=200,
        seed=seed,
        trackers=[],
        evaluate_every=EPOCHS * steps,
    )  # fmt: skip


def measured(kind: str, name: str, rate: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train a design, and return its row."""
    plan, start = recipe(kind, name, rate, seed, args), time.process_time()
    resume = plan.folder if any(plan.folder.glob("checkpoints/step-*")) else None
    result = train(plan, resume=resume, console=QUIET)
    if result.interrupted:
        raise SystemExit(128 + result.interrupted)
    row = {"data": kind, "design": name, "rate": rate, "seed": seed, "top1": result.metrics["top1"],
           "cpu_s": None if resume else round(time.process_time() - start, 1)}  # fmt: skip
    if EVERY[name].kind == "gmconv":
        layers = analysis.masks(result.model).layers
        row["sigma"] = {layer.name: [round(float(value), 3) for value in layer.sigma] for layer in layers}
    return row


def best_rate(kind: str, name: str, rows: list[dict[str, Any]]) -> float:
    """Return the best learning rate of a design."""
    found = [row for row in rows if (row["data"], row["design"], row["seed"]) == (kind, name, TUNING)]
    return float(max(found, key=lambda row: row["top1"])["rate"])


def tables(rows: list[dict[str, Any]]) -> str:
    """Return a table for each set and group."""
    parts = []
    for kind in ("fashion", "photos"):
        scores = {
            name: {row["seed"]: row["top1"] for row in rows
                   if (row["data"], row["design"]) == (kind, name) and row["seed"] != TUNING}
            for name in EVERY
        }  # fmt: skip
        for group, designs in DESIGNS.items():
            base, lines = scores[BASE[group]], []
            for name in designs:
                own = scores[name]
                if not own:
                    continue
                paired = [value - base[seed] for seed, value in own.items() if seed in base]
                sigmas = [row["sigma"] for row in rows if row["design"] == name and row["data"] == kind
                          and row["seed"] != TUNING and "sigma" in row]  # fmt: skip
                lines.append({
                    "design": name, "seeds": str(len(own)), "rate": f"{best_rate(kind, name, rows):g}",
                    "top-1": spread(list(own.values())),
                    f"minus {BASE[group]}": "-" if name == BASE[group] or not paired else spread(paired),
                    "sigma by block": ", ".join(
                        f"{sum(float(one[layer][0]) for one in sigmas) / len(sigmas):.2f}" for layer in sigmas[0]
                    ) if sigmas else "",
                })  # fmt: skip
            if lines:
                used = [key for key in lines[0] if any(line[key] for line in lines)]
                parts.append(f"{kind}, {group}\n\n" + report.markdown([{k: line[k] for k in used} for line in lines]))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, help="folder with the files of Fashion-MNIST")
    parser.add_argument("--data", nargs="+", choices=("fashion", "photos"), default=["fashion", "photos"])
    parser.add_argument("--groups", nargs="+", choices=tuple(DESIGNS), default=list(DESIGNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("runs/real_fields"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if "fashion" in args.data and args.fashion is None:
        parser.error("--data fashion needs --fashion ROOT, the folder with the files of Fashion-MNIST.")
    torch.set_num_threads(1)
    stem = args.out / "real_fields"
    stored = stem.with_suffix(".json")
    rows: list[dict[str, Any]] = json.loads(stored.read_text())["rows"] if stored.exists() else []
    names = list(dict.fromkeys(name for group in args.groups for name in DESIGNS[group]))

    def run(kind: str, name: str, rate: float, seed: int) -> None:
        if any((row["data"], row["design"], row["rate"], row["seed"]) == (kind, name, rate, seed) for row in rows):
            return
        rows.append(measured(kind, name, rate, seed, args))
        print(rows[-1], flush=True)
        publish(stem, "python experiments/real_fields.py --fashion ROOT", {"rows": rows}, tables(rows))

    for kind in args.data:
        for name in names:
            for rate in RATES:
                run(kind, name, rate, TUNING)
        for seed in args.seeds:
            for name in names:
                run(kind, name, best_rate(kind, name, rows), seed)


if __name__ == "__main__":
    main()
