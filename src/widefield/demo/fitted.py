"""Fit kernel sizes to crops of photographs, starting from pretrained weights."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from widefield import data, report
from widefield.demo import photographs
from widefield.demo.chapter import Chapter
from widefield.fitting import FitResult, fit
from widefield.fitting.page import field_of, network_rows, wanted
from widefield.fitting.result import CHEAPER, GAIN, NO_MATTER, NOTHING
from widefield.report import Part, Section
from widefield.train import load_recipe
from widefield.train.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "photo_crops"
FOLDER = "fit"
_SETTINGS: dict[str, Any] = {"budget": "macs", "limit": 1.1, "probe": 0.4, "readings": 32, "onnx": False}
"""Multiply-accumulates are the same on every machine, whatever else it does. 1.1: larger kernels may cost something."""
_MEANING = {
    GAIN: "So the network with the chosen sizes is better after equal training. A part of that may come from the "
    "probe, from which the unchanged network does not start: repeat with other seeds before you build on it.",
    CHEAPER: "No difference in accuracy is shown, and the network with the chosen sizes costs less.",
    NOTHING: "So the published kernel sizes are as good for these crops as any that were tried. Keep the network: this "
    "is a result, and it took minutes.",
    NO_MATTER: "So kernel sizes are not where these crops are won or lost. They show textures, which small kernels "
    "tell apart, and the network pools over the whole crop. Choose the sizes by cost alone.",
}
"""Verdict -> what it means."""
_QUESTION = (
    "A new task for the same network: from which of twelve photographs is this crop? Crops are gray and have equal "
    "contrast, so that color and brightness do not give them away, and no pixel is in both splits. Should the network "
    "keep its kernel sizes for this task? widefield fit trains a copy that can run at all sizes, reads its loss at "
    "many combinations on one half of the validation crops, and chooses. It fine-tunes a plain network with the chosen "
    "sizes, and compares it with the unchanged network on the other half, after equal training."
)
_FIELDS = (
    "Effective receptive fields after training, with the unchanged and with the chosen sizes: do other kernels make "
    "the network look farther?"
)


class PhotoCrops:
    """The pretrained network on photographs, and the fit to crops of them.

    Args:
        folder: of the demo.
        overrides: overrides of the recipe ``demo_photo_crops``.

    Raises:
        ValueError, TypeError: an override does not fit.
    """

    name = NAME

    def __init__(self, folder: Path, overrides: Sequence[str] = ()) -> None:
        self.folder = folder
        self.recipe: Recipe = load_recipe(f"demo_{NAME}", overrides)

    def run(self, console: Console) -> Chapter:
        """Look at photographs and fit; write the fit into ``fit``, in place of an earlier one.

        Raises:
            ModuleNotFoundError: a package is missing; see :func:`widefield.demo.photographs.missing`.
            SystemExit: Ctrl-C or SIGTERM, with 130 or 143.
        """
        console.print("a pretrained network on photographs")
        first = photographs.chapter(photographs.look())
        shutil.rmtree(self.folder / FOLDER, ignore_errors=True)
        console.print("[bold]fitting kernel sizes[/] to crops of photographs")
        result = fit(self.recipe, out=self.folder / FOLDER, console=console, **_SETTINGS)
        verdict = result.verdict
        headline = (
            f"Asked which kernel sizes it needs to tell crops of twelve photographs apart, widefield fit answers: "
            f"{verdict.words}."
        )
        sizes = tuple(
            {"layers": group.name, "was": f"{group.own}x{group.own}", "is": f"{size}x{size}"}
            for group, size in zip(result.groups, result.choice.sizes, strict=True)
        )
        asked = f"Which kernel sizes does a new task need? {_capital(verdict.words)}"
        return Chapter(
            headline=f"{first.headline} {headline}",
            sections=(
                *first.sections,
                Section(asked, self._fitted(result)),
            ),
            numbers={**first.numbers, "recipe": dataclasses.asdict(self.recipe), "fit": result.to_dict()},
            tables=(*first.tables, (f"Kernel sizes: {verdict.words}", sizes)),
        )

    def _fitted(self, result: FitResult) -> list[Part]:
        """Return the section about the fit."""
        verdict = result.verdict
        parts: list[Part] = [
            _QUESTION,
            report.Plot(self._crops(), "Crops of the val split, one of each photograph."),
            f"{_capital(verdict.words)}. {verdict.text} {_MEANING[verdict.words]}",
            report.Table(network_rows(result)),
            *wanted(result),
        ]
        parts += field_of(result, _FIELDS)
        length = self.recipe.max_steps or self.recipe.epochs
        limits = (
            f"What this does not say: it is one training of {length} {result.spec.unit}s with one seed. Short "
            f"trainings favor small kernels, and {verdict.difference.images} crops do not show differences within the "
            "interval."
        )
        place = f"{FOLDER}/{result.page.name}"
        more = report.Link(place, "The fit's own page: costs, candidates, Pareto front, method")
        return [*parts, limits, more]

    def _crops(self) -> Figure:
        """Draw one val crop of each photograph."""
        crops = data.create(NAME, "val", **self.recipe.data.args)
        mean, std = (torch.tensor(v)[:, None, None] for v in (crops.mean, crops.std))
        with report.paper():
            figure = report.blank(0.7 * report.PAGE, 4.1)
            for index, axis in enumerate(figure.subplots(3, 4).flat):
                axis.axis("off")
                sample = crops[index] if index < len(crops) else None
                if sample is not None:
                    axis.imshow((sample["image"] * std + mean).clamp(0, 1).movedim(0, -1).numpy())
                    axis.set_title(crops.classes[sample["label"]], fontsize=8)
        return figure


def _capital(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}"
