"""Train a network with 7x7 kernels, and with soft and hard mixtures of receptive fields; fuse, verify and measure them.

All have the same data, seed and budget.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from widefield import bench, data, report, tasks
from widefield._keys import keys_of
from widefield.analysis.blocks import BlockContributions, block_contributions
from widefield.analysis.routing import RoutingStatistics, block_names, routing_statistics
from widefield.demo.chapter import Chapter
from widefield.loading import load_trained
from widefield.runs import evaluate_model, write_report
from widefield.runs.headline import Found, evaluated_words
from widefield.surgery import Difference, compare, reparameterize
from widefield.train import ConversionSpec, Recipe, build_model, load_recipe, train

PAGE = "mixtures.html"
BASELINE = "7x7"
VARIANTS: Mapping[str, Mapping[str, Any] | None] = {
    BASELINE: None,
    "MoRF soft": {"routing": "soft"},
    "MoRF hard": {"routing": "hard"},
}
MEASURED_BATCH = 64
_ABOUT = (
    "All three networks have the same shape, seed, data and number of steps. Times are medians of interleaved runs "
    f"with a batch of {MEASURED_BATCH}, with the 20th and 80th percentile, and the ratio to the 7x7 network in the "
    "same run. The last row is the largest difference between the outputs before and after reparameterization over all "
    "validation images, in units of the largest output. The second and third row are top-1 while blocks are off: they "
    "return their input, and their kernels take no part."
)
_EXAMPLES = (
    "Under each image are its routing weights, one row per block and one column per expert. Rows that are alike under "
    "all images belong to routers that do not look at the image."
)
_SEEDS = "Each network was trained once. Intervals are those of other images; other seeds may reverse the order."
_FUSED = (
    "While it learns, each expert has its own kernel: {experts}. Fusing pads all of them with zeros to {largest} and "
    "stacks them in one bank, so that a single multiplication mixes them and a single convolution applies the mix. The "
    "zeros count as parameters ({name}: {before:,} before, {after:,} after). They learn nothing, and the "
    "multiply-accumulates stay the same."
)
_DEAD = (
    "An expert whose share of the routing weight, averaged over images, is below one percent of an even share. Without "
    "it the outputs would hardly change: it is a cost without a use."
)
_SIGNED = (
    "Soft routing does not normalize its weights, as in the paper. A weight can be negative: the expert's kernel is "
    "then subtracted, so that what it answered to counts against. In the pictures red is positive, blue is negative, "
    "and no color is zero. Shares in tables count the size of a weight without its sign. Hard routing chooses the "
    "largest weights and makes them positive, with a sum of 1."
)
_OFF = (
    "The block returns its input. If the accuracy stays, these images do not need the block, and no kernel in it can "
    "show that it is better than another."
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Results of one network. Times are medians of interleaved runs, in seconds for a batch of MEASURED_BATCH."""

    accuracy: float
    cost: bench.Cost
    fused_cost: bench.Cost
    step: bench.Row
    inference: bench.Row
    fused_inference: bench.Row
    blocks: BlockContributions
    """What the residual blocks contribute to the accuracy."""
    difference: Difference | None
    """Between fused and unfused outputs; None for the baseline, which is not fused."""


class Mixtures:
    """The three networks on one data set.

    Args:
        name: "digits" or "scales".
        folder: of the demo.
        overrides: overrides of the recipe ``demo_<name>``, as in ``widefield train``.

    Raises:
        ValueError, TypeError: an override does not fit.
    """

    def __init__(self, name: str, folder: Path, overrides: Sequence[str] = ()) -> None:
        for key, _ in keys_of(overrides):
            if key.partition(".")[0] in ("conversion", "name", "output"):
                raise ValueError(f"the demo sets {key} itself: leave it out, or use widefield train.")
        self.name, self.folder = name, folder
        self.recipe = load_recipe(f"demo_{name}", [*overrides, "--output", str(folder)])
        self.validation = data.create(self.recipe.data.name, "val", **self.recipe.data.args)
        self.task = tasks.create(self.recipe.task.name, self.validation, **self.recipe.task.args)
        for variant, mixture in VARIANTS.items():  # build all before the first is trained, to find errors early
            build_model(_variant(self.recipe, variant, mixture), self.task)

    def run(self, console: Console) -> Chapter:
        """Train, fuse and measure; write ``mixtures.html``, four PNGs and the three runs, in place of earlier ones.

        Raises:
            SystemExit: Ctrl-C or SIGTERM, with 130 or 143.
        """
        for variant in VARIANTS:
            shutil.rmtree(self.folder / _slug(variant), ignore_errors=True)
        models: dict[str, nn.Module] = {}
        for variant, mixture in VARIANTS.items():
            console.print(f"[bold]{variant}[/] on {self.name}")
            result = train(_variant(self.recipe, variant, mixture), console=console)
            if result.interrupted:
                raise SystemExit(128 + result.interrupted)
            models[variant] = load_trained(result.folder, "best")  # as in the page about the runs

        console.print("reparameterizing and measuring")
        batches = list(DataLoader(self.validation, batch_size=250, collate_fn=data.collate))
        images: Tensor = torch.cat([batch["image"] for batch in batches])
        pairs = [(batch["image"], batch["label"]) for batch in batches]
        blocks = {variant: block_contributions(models[variant], pairs, name=variant) for variant in VARIANTS}
        classes = self.validation.classes
        found = {variant: self._evaluated(model) for variant, model in models.items()}
        entries = _measure(models, found, blocks, images, self.task, len(classes))
        routings = {
            v: routing_statistics(models[v], batches, classes=classes, name=v, batch_size=len(images))
            for v in VARIANTS
            if v != BASELINE
        }
        return self._chapter(entries, evaluated_words(found), routings, batches)

    def _evaluated(self, model: nn.Module) -> Found:
        """Return which validation images a network gets right."""
        evaluation = evaluate_model(model, self.validation, self.task, workers=0, device="cpu", examples=1)
        return Found(evaluation, self.name, self.task.headline)

    def _chapter(
        self,
        entries: Mapping[str, Entry],
        words: Sequence[str],
        routings: Mapping[str, RoutingStatistics],
        batches: Sequence[Mapping[str, Any]],
    ) -> Chapter:
        """Write the figures and the page about the three runs; return the chapter.

        ``words`` are paragraphs on which network is the best, and on what is not decided.
        """
        rows = _rows(entries)
        examples = {variant: _examples(variant, found, self.validation, batches) for variant, found in routings.items()}
        for variant, found in routings.items():
            (self.folder / f"routing-{_slug(variant)}.png").write_bytes(report.png(found.plot(kind="choices")))
            (self.folder / f"examples-{_slug(variant)}.png").write_bytes(report.png(examples[variant]))
        lead = (
            f"A narrow ConvNeXt on {self.name}: with 7x7 kernels, and with mixtures of 3x3 to 11x11 experts that a "
            "router weights for each image."
        )
        terms = report.Terms(_terms(entries, routings))
        table: list[report.Part] = [_ABOUT, report.Table(rows), terms]
        pictures = {variant: report.Plot(figure, _EXAMPLES) for variant, figure in examples.items()}
        write_report(
            [self.folder / _slug(variant) for variant in VARIANTS],
            self.folder / PAGE,
            title="A mixture of receptive fields",
            lead=lead,
            first=[
                report.Section("Cost and accuracy", table),
                *(report.Section(f"Examples: {v}", [picture]) for v, picture in pictures.items()),
            ],
        )
        more = report.Link(PAGE, "All about these three networks: training, fields, routing, blocks, kernels")
        shown: list[report.Part] = [lead, *table, _SEEDS, next(iter(pictures.values())), more]
        numbers = {
            "data": self.name,
            "recipe": dataclasses.asdict(self.recipe),
            "models": {v: dataclasses.asdict(entry) for v, entry in entries.items()},
            "routing": {v: [block.to_dict() for block in found.blocks] for v, found in routings.items()},
        }
        return Chapter(
            headline=" ".join(words[:-1]),
            sections=(report.Section("A kernel size for each image", shown),),
            numbers=numbers,
            tables=(("Mixtures of receptive fields", tuple(rows)),),
        )


def _slug(variant: str) -> str:
    return variant.lower().replace(" ", "-")


def _variant(recipe: Recipe, variant: str, mixture: Mapping[str, Any] | None) -> Recipe:
    conversion = mixture and ConversionSpec("morf", "*.conv_dw", dict(mixture))
    return dataclasses.replace(recipe, name=_slug(variant), conversion=conversion or None)


def _measure(
    models: Mapping[str, nn.Module],
    found: Mapping[str, Found],
    blocks: Mapping[str, BlockContributions],
    images: Tensor,
    task: tasks.Task,
    classes: int,
) -> dict[str, Entry]:
    x = images[torch.arange(MEASURED_BATCH) % len(images)]
    batch = {"image": x, "label": torch.arange(MEASURED_BATCH) % classes}

    def step(model: nn.Module) -> None:
        model.train()
        model.zero_grad()
        task.loss(model, batch).backward()

    def infer(model: nn.Module) -> None:
        with torch.inference_mode():
            model.eval()(x)

    steps = bench.measure({v: partial(step, m) for v, m in models.items()}, repeats=11, warmup=2)
    for model in models.values():
        model.eval()
        model.zero_grad()
    fused = {v: m if v == BASELINE else reparameterize(m, x) for v, m in models.items()}
    candidates = {v: partial(infer, m) for v, m in models.items()}
    candidates |= {f"{v} fused": partial(infer, m) for v, m in fused.items()}
    inference = bench.measure(candidates, repeats=21, warmup=3)
    return {
        v: Entry(
            accuracy=found[v].evaluation.metrics["top1"],
            cost=bench.cost(model, x[:1]),
            fused_cost=bench.cost(fused[v], x[:1]),
            step=steps[v],
            inference=inference[v],
            fused_inference=inference[f"{v} fused"],
            blocks=blocks[v],
            difference=None if v == BASELINE else compare(model, fused[v], images),
        )
        for v, model in models.items()
    }


def _rows(entries: Mapping[str, Entry]) -> list[dict[str, str]]:
    """One row a quantity, one column a network."""
    base = entries[BASELINE]

    def throughput(row: bench.Row, reference: bench.Row) -> str:
        spread = f"{MEASURED_BATCH / row.p80:.0f}-{MEASURED_BATCH / row.p20:.0f}"
        return f"{MEASURED_BATCH / row.p50:.0f} ({spread}), {reference.p50 / row.p50:.2f}x"

    def step(row: bench.Row) -> str:
        return f"{1e3 * row.p50:.1f} ({1e3 * row.p20:.1f}-{1e3 * row.p80:.1f}), {row.p50 / base.step.p50:.2f}x"

    quantities: dict[str, Callable[[Entry], str]] = {
        "top-1": lambda e: f"{100 * e.accuracy:.1f}%",
        "one block off": lambda e: _range([b.score for b in e.blocks.blocks]),
        "all blocks off": lambda e: _range([e.blocks.together.score]),
        "parameters": lambda e: f"{e.cost.parameters:,}",
        "parameters, fused": lambda e: f"{e.fused_cost.parameters:,}",
        "MACs": lambda e: f"{e.cost.macs / 1e6:.2f}M",
        "training step, ms": lambda e: step(e.step),
        "images/s": lambda e: throughput(e.inference, base.inference),
        "images/s, fused": lambda e: throughput(e.fused_inference, base.fused_inference),
        "changed by fusing": lambda e: "-" if e.difference is None else f"{e.difference.relative:.1e}",
    }
    return [{"": q, **{name: show(entry) for name, entry in entries.items()}} for q, show in quantities.items()]


def _range(shares: Sequence[float | None]) -> str:
    known = [100 * share for share in shares if share is not None]
    low, high = f"{min(known):.1f}%", f"{max(known):.1f}%"
    return low if low == high else f"{low[:-1]} to {high}"


def _terms(entries: Mapping[str, Entry], routings: Mapping[str, RoutingStatistics]) -> dict[str, str]:
    """Return words of the table and the figures, and what they mean for these networks."""
    name, found = next(iter(routings.items()))
    block, entry = found.blocks[0], entries[name]
    largest = block.experts[int(np.argmax(block.sizes))]
    signed = [v for v, one in routings.items() if any((block.weights < 0).any() for block in one.blocks)]
    before, after = entry.cost.parameters, entry.fused_cost.parameters
    return {
        "Why a fused mixture has more parameters": _FUSED.format(
            experts=", ".join(block.experts), largest=largest, name=name, before=before, after=after
        ),
        "Dead expert": f"{_DEAD} {' '.join(_dead(variant, one) for variant, one in routings.items())}",
        "Signed routing weights": f"{_SIGNED} Negative weights occur in {' and '.join(signed) or 'none of these'}.",
        "Block off": _OFF,
    }


def _dead(variant: str, found: RoutingStatistics) -> str:
    """Return a sentence on the dead experts of a network."""
    names = dict(zip(block_names(found.blocks), found.blocks, strict=True))
    dead = [f"{name} ({', '.join(block.dead())})" for name, block in names.items() if block.dead()]
    return f"{variant} has dead experts in {', '.join(dead)}." if dead else f"{variant} has none."


def _examples(
    variant: str, found: RoutingStatistics, validation: data.SampleSet, batches: Sequence[Mapping[str, Any]]
) -> Any:
    labels = torch.cat([batch["label"] for batch in batches])
    if "size" in batches[0]:  # the smallest to the largest object
        order = torch.cat([batch["size"] for batch in batches]).argsort()
        chosen = [int(order[i]) for i in torch.linspace(0, len(order) - 1, 8).long()]
    else:  # one of each class
        chosen = [int((labels == label).nonzero()[0]) for label in range(min(8, len(validation.classes)))]
    images = torch.cat([batch["image"] for batch in batches])[chosen]
    mean, std = (torch.tensor(v)[:, None, None] for v in (validation.mean, validation.std))
    pictures = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    weights = np.stack([block.weights[chosen] for block in found.blocks], 1)
    return report.examples(
        list(pictures),
        [validation.classes[int(labels[i])] for i in chosen],
        list(weights),
        block_names(found.blocks),
        found.blocks[0].experts,
        f"{variant}: routing weights",
    )
