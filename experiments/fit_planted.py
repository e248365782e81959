"""Does `widefield fit` find the field that data need? Scenes with planted answers, and every anchor at the same budget.

nice python experiments/fit_planted.py [--data small large mixed colors noise] [--seeds 0 1 2 3 4]
    [--arms fit 7 3 5 11 random rf-next]

Images, labels and network are those of `shapes.py`, with objects of 8 to 14 pixels on a weak texture (small), of 28 to
42 (large), of 6 to 42 (mixed); `colors`: objects whose color is their class; `noise`: a random class at each pixel. All
arms see the same number of images in training; `fit` and `rf-next` search in the first 20 % of them. Scores are those
of 1,000 test images that no arm saw.

Rows are written to --out after every run, and those that it holds are not run again. Interrupted runs continue.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from shapes import BATCH, BLOCKS, SETS, base, tested
from torch import Tensor, nn
from trials import QUIET, spread, trained

from widefield import ops, report, surgery
from widefield.benchmarks.record import publish
from widefield.fitting import fit
from widefield.fitting.recipes import part_of
from widefield.loading import load_trained
from widefield.surgery import Conversion
from widefield.train import ConversionSpec, Recipe, recipe

ARMS = ("fit", "7", "3", "5", "11", "random", "rf-next")
SIZES = (3, 5, 7, 11)
SEARCH = 0.2
"""Share of the training in which `rf-next` searches: that of `fit`."""
CONTROLS = {"colors": ("fit", "7", "3"), "noise": ("fit", "7")}
"""Arms of the sets in which the field does not matter."""


# RF-Next (Gao et al., TPAMI 2022): branches of one kernel at several dilations. Weights are the branches' shares.


class Branches(nn.Module):
    """A depthwise convolution at two dilations around a center that moves after each epoch of training.

    The search is that of mmcv's `rfsearch`: rates 0.5, shares `|a_i| / sum |a|` from 0.01, dilations 1 to 24.
    """

    def __init__(self, conv: nn.Conv2d, steps: int) -> None:
        super().__init__()
        self.weight, self.bias, self.steps = conv.weight, conv.bias, steps
        self.shares = nn.Parameter(torch.full((2,), 0.01))
        self.register_buffer("dilation", torch.tensor(1))
        self.register_buffer("seen", torch.tensor(0))

    def candidates(self) -> list[int]:
        center = int(self.dilation)
        return sorted({min(max(round(center * rate), 1), 24) for rate in (0.5, 1.5)})

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if int(self.seen) and int(self.seen) % self.steps == 0:
                self.move()
            self.seen += 1
        rates, share = self.candidates(), self.share()
        reach = self.weight.shape[-1] // 2
        return sum(
            p * ops.depthwise_conv2d(x, self.weight, self.bias, padding=reach * d, dilation=d)
            for p, d in zip(share, rates, strict=True)
        )

    def share(self) -> Tensor:
        """Return the shares of the candidates."""
        found = self.shares.abs()[: len(self.candidates())]
        return found / found.sum()

    @torch.no_grad()
    def move(self) -> None:
        """Move the center to the mean of the candidates, and start again."""
        rates = torch.tensor(self.candidates(), dtype=self.shares.dtype)
        self.dilation.fill_(round(float((self.share() * rates).sum())))
        self.shares.fill_(0.01)


@dataclasses.dataclass(frozen=True)
class Dilations(Conversion):
    """Search the dilation of depthwise convolutions."""

    layers = (Branches,)
    steps: int = 1

    def _why_not(self, module: nn.Module) -> str | None:
        return surgery.FastDepthwise().why_not(module)

    def _replace(self, conv: nn.Conv2d) -> nn.Module:
        return Branches(conv, self.steps)


@dataclasses.dataclass(frozen=True)
class Dilate(Conversion):
    """Give a depthwise convolution a dilation."""

    dilation: int = 1

    def _why_not(self, module: nn.Module) -> str | None:
        return surgery.FastDepthwise().why_not(module)

    def _replace(self, conv: nn.Conv2d) -> nn.Module:
        reach = self.dilation * (conv.kernel_size[0] // 2)
        new = nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, padding=reach, dilation=self.dilation,
            groups=conv.groups,
        )  # fmt: skip
        new.weight, new.bias = conv.weight, conv.bias
        return new


surgery.Dilations, surgery.Dilate = Dilations, Dilate  # type: ignore[attr-defined]
recipe.CONVERSIONS.update(dilations="Dilations", dilate="Dilate")


def resized(plan: Recipe, sizes: list[int], arm: str) -> Recipe:
    """Return a recipe whose block i has kernels of ``sizes[i]``."""
    specs = [
        ConversionSpec("resize", [f"*blocks.{block}.conv_dw" for block in range(len(sizes)) if sizes[block] == size],
                       {"kernel_size": size})
        for size in sorted(set(sizes) - {7})
    ]  # fmt: skip
    first, rest = (specs[0], specs[1:]) if specs else (None, [])
    return dataclasses.replace(plan, name=f"{plan.name}-{arm}", conversion=first, more_conversions=rest)


def of_equal_cost(sizes: list[int], seed: int) -> list[int]:
    """Return random sizes of about the same number of taps, other than ``sizes`` themselves."""
    stream, taps = random.Random(seed), sum(size**2 for size in sizes)
    draws = [[stream.choice(SIZES) for _ in sizes] for _ in range(200)]
    return min((draw for draw in draws if draw != sizes), key=lambda draw: abs(sum(s**2 for s in draw) - taps))


def searched(plan: Recipe) -> tuple[nn.Module, dict[str, Any]]:
    """Search dilations in the first part of the training, and train on at those found."""
    whole, steps = plan.max_steps or 0, plan.data.args["count"] // BATCH
    first = round(SEARCH * whole / steps) * steps
    search = dataclasses.replace(
        part_of(plan, 0, first), name=f"{plan.name}-rf-search",
        conversion=ConversionSpec("dilations", None, {"steps": steps}),
    )  # fmt: skip
    model = trained(search).model
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Branches)}
    for layer in layers.values():
        layer.move()  # at the end of the last epoch
    found = {name: int(layer.dilation) for name, layer in layers.items()}
    weights = {key: value for key, value in model.state_dict().items()
               if key.rpartition(".")[2] not in ("shares", "dilation", "seen")}  # fmt: skip
    start = search.folder / "start.pt"
    torch.save(weights, start)
    specs = [
        ConversionSpec("dilate", [f"*{name.partition('blocks.')[2] and 'blocks.' + name.partition('blocks.')[2]}"],
                       {"dilation": rate})
        for name, rate in found.items()
    ]  # fmt: skip
    final = dataclasses.replace(
        part_of(plan, first, whole - first), name=f"{plan.name}-rf-next",
        model=dataclasses.replace(plan.model, pretrained=str(start)), conversion=specs[0], more_conversions=specs[1:],
    )  # fmt: skip
    return trained(final).model, {"dilations": list(found.values())}


def measured(name: str, seed: int, arm: str, args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Run one arm, and return its row."""
    plan = base(name, seed, images=args.images, epochs=args.epochs, lr=args.lr, runs=args.runs)
    started, found = time.process_time(), {}
    if arm == "fit":
        unchanged = args.runs / f"{plan.name}-7"
        result = fit(
            dataclasses.replace(plan, name=f"{plan.name}-7"), kernel_sizes=SIZES, by="layer", limit=None,
            budget="macs", onnx=False, unchanged=str(unchanged), out=args.runs / f"{plan.name}-fit", console=QUIET,
        )  # fmt: skip
        model = load_trained(result.folder / result.verdict.plain.folder, "last")
        found = {"sizes": list(result.choice.sizes), "matters": result.choice.matters, "verdict": result.verdict.words}
    elif arm == "rf-next":
        model, found = searched(plan)
    else:
        chosen = next(
            (row["sizes"] for row in rows if (row["data"], row["seed"], row["arm"]) == (name, seed, "fit")), None
        )
        sizes = of_equal_cost(chosen or [7] * BLOCKS, seed) if arm == "random" else [int(arm)] * BLOCKS
        model, found = trained(resized(plan, sizes, arm)).model, {"sizes": sizes}
    seconds = time.process_time() - started
    return {
        "data": name,
        "seed": seed,
        "arm": arm,
        **found,
        "cpu_s": round(seconds, 1),
        "metrics": tested(model, name, seed),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return a row per set and arm: mIoU, and the difference of `fit` to the arm, paired by seed."""
    lines = []
    for name in SETS:
        scores = {
            arm: {row["seed"]: row["metrics"]["miou"] for row in rows if (row["data"], row["arm"]) == (name, arm)}
            for arm in ARMS
        }
        for arm in ARMS:
            own = scores[arm]
            if own:
                paired = [scores["fit"][seed] - value for seed, value in own.items() if seed in scores["fit"]]
                sizes = [str(row.get("sizes", row.get("dilations"))) for row in rows
                         if (row["data"], row["arm"]) == (name, arm)]  # fmt: skip
                lines.append({
                    "data": name, "arm": arm, "seeds": str(len(own)), "mIoU": spread(list(own.values())),
                    "fit minus this": "-" if arm == "fit" or not paired else spread(paired),
                    "sizes, by block": "; ".join(sizes) if arm in ("fit", "random", "rf-next") else "",
                })  # fmt: skip
    return report.markdown(lines) if lines else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=16e-3)
    parser.add_argument("--runs", type=Path, default=Path("runs/fit_planted"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stem = args.out / "fit_planted"
    stored = stem.with_suffix(".json")
    rows = json.loads(stored.read_text())["rows"] if stored.exists() else []
    command = f"python experiments/fit_planted.py --images {args.images} --epochs {args.epochs} --lr {args.lr:g}"
    for seed in args.seeds:
        for name in args.data:
            arms = [arm for arm in args.arms if arm in CONTROLS.get(name, ARMS)]
            for arm in sorted(arms, key=("7", "fit", *ARMS).index):  # fit compares itself with the run of 7
                if any((row["data"], row["seed"], row["arm"]) == (name, seed, arm) for row in rows):
                    continue
                row = measured(name, seed, arm, args, rows)
                stored_rows = json.loads(stored.read_text())["rows"] if stored.exists() else []
                rows = [*stored_rows, row]
                print(row, flush=True)
                publish(stem, command, {"rows": rows}, table(rows))


if __name__ == "__main__":
    main()
