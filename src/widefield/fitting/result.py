"""Define the result of a fit, which can be loaded from its folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from widefield._intervals import Interval
from widefield.fitting.choose import Additive, Candidate, Choice, Point
from widefield.fitting.costs import Costs
from widefield.fitting.figures import draw_front
from widefield.fitting.groups import Group, Groups, Layer
from widefield.fitting.progress import read_log
from widefield.fitting.read import Readings
from widefield.fitting.recipes import PLAIN
from widefield.fitting.spec import FitSpec
from widefield.loading.trained import load_trained
from widefield.report import Report
from widefield.train.checkpoint import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COSTS, CHOICE, VERDICT, PAGE = "costs.json", "choice.json", "verdict.json", "index.html"
GAIN, CHEAPER, NOTHING, NO_MATTER = (
    "gain",
    "as good and cheaper",
    "nothing to gain here",
    "the field does not matter for these data",
)
"""The verdicts."""


@dataclass(frozen=True)
class Network:
    """One of the two networks that are compared."""

    folder: str
    """Of its run, relative to the fit's folder if it is in there."""
    metrics: Mapping[str, float]
    """On the report half."""
    parameters: int
    macs: int
    """For one image."""
    latency: float
    """Seconds of a forward pass, 20th percentile."""
    field: Mapping[str, float]
    """Share of the effective receptive field, such as "0.5" -> share of the image's area in the smallest central square
    that holds it; empty if it could not be measured. The fields are in ``erf.json`` and ``erf.png``."""


@dataclass(frozen=True)
class SizeRow:
    """Ratings of images with objects of similar size."""

    low: float
    """Smallest object, in pixels."""
    high: float
    plain: float
    unchanged: float
    difference: Interval


@dataclass(frozen=True)
class Verdict:
    """What the fit found.

    Attributes:
        words: one of four: "gain", "as good and cheaper", "nothing to gain here", "the field does not matter for these
            data".
        text: the same in sentences with numbers.
        recommended: name of the run to use: "plain" or "unchanged".
        headline: the task's metric.
        rating: what the rating of an image is.
        difference: of the ratings, plain minus unchanged; larger is better.
        plain, unchanged: the networks. They are the same if the unchanged sizes were chosen.
        sizes: by object size, smallest first; empty if sizes are unknown.
        notes: what could not be done, and why.
    """

    words: str
    text: str
    recommended: str
    headline: str
    rating: str
    difference: Interval
    plain: Network
    unchanged: Network
    sizes: tuple[SizeRow, ...]
    notes: tuple[str, ...]

    @property
    def latency(self) -> float:
        """Return the latency of the plain network relative to the unchanged one."""
        return self.plain.latency / self.unchanged.latency


@dataclass(frozen=True)
class FitResult(Report):
    """The result of a fit: settings, groups, costs, readings, choice and verdict. Printed as a summary and a table."""

    spec: FitSpec
    groups: Groups
    costs: Costs
    readings: Readings
    choice: Choice
    verdict: Verdict
    seconds: Mapping[str, float]
    """Phase -> seconds."""
    environment: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Return the folder of the fit."""
        return self.spec.folder

    @property
    def page(self) -> Path:
        """Return the file of the page about the fit."""
        return self.folder / PAGE

    @property
    def run(self) -> Path:
        """Return the folder of the recommended run, which all verbs take."""
        network = self.verdict.plain if self.verdict.recommended == PLAIN else self.verdict.unchanged
        return self.folder / network.folder

    @property
    def sizes(self) -> dict[str, int]:
        """Return the chosen size of each group."""
        return {group.name: size for group, size in zip(self.groups, self.choice.sizes, strict=True)}

    def model(self) -> nn.Module:
        """Return the recommended network, trained, on the CPU and in evaluation mode."""
        return load_trained(self.run, "last")

    def summary(self) -> str:
        """Return the verdict."""
        return f"{self.verdict.words.capitalize()}. {self.verdict.text}"

    def rows(self) -> list[dict[str, str]]:
        """Return one row per group: its size before and after, and the loss of each size against its own."""
        effects = self.choice.model.effects
        sizes = self.groups.sizes
        return [
            {
                "layers": group.name,
                "was": f"{group.own}x{group.own}",
                "is": f"{size}x{size}",
                **{
                    f"loss at {other}x{other}": f"{effects[group.name][other]:+.2g}" if other in group.sizes else "-"
                    for other in sizes
                },
            }
            for group, size in zip(self.groups, self.choice.sizes, strict=True)
        ]

    def drawings(self) -> dict[str, Figure]:
        """Return the figure of :meth:`plot`, by caption."""
        return {"Loss against cost: sizes that were read, the predicted front, and the choice.": self.plot()}

    def plot(self) -> Figure:
        """Draw loss against cost: what was read, the predicted front, the choice, and the unchanged network."""
        return draw_front(self.choice, self.groups, self.costs, self.spec.limit)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the losses of single images, in JSON's types."""
        return {
            "settings": self.spec.to_dict(),
            "groups": groups_dict(self.groups),
            "costs": self.costs.to_dict(),
            "choice": choice_dict(self.choice),
            "verdict": dataclasses.asdict(self.verdict),
            "seconds": dict(self.seconds),
            "environment": dict(self.environment),
        }

    @classmethod
    def load(cls, folder: str | Path) -> FitResult:
        """Read the result of a finished fit.

        Raises:
            FileNotFoundError: there is no fit, or it is not finished.
        """
        spec = FitSpec.load(folder)
        groups, costs = load_costs(spec.folder)
        content = _read(spec.folder / VERDICT)
        return cls(
            spec=spec,
            groups=groups,
            costs=costs,
            readings=Readings.load(spec.folder),
            choice=load_choice(spec.folder),
            verdict=verdict_of(content["verdict"]),
            seconds=read_log(spec.folder),
            environment=content["environment"],
        )


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"the fit in {file.parent} is not finished: it has no {file.name}. Continue it: widefield fit --resume "
            f"{file.parent}."
        )
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file of the fit atomically; raises OSError."""
    write_text(file, json.dumps(content, indent=1) + "\n")


def groups_dict(groups: Groups) -> dict[str, Any]:
    """Return groups in JSON's types."""
    return dataclasses.asdict(groups)


def save_costs(folder: Path, groups: Groups, costs: Costs) -> None:
    """Write ``costs.json``: the groups and the costs of their sizes."""
    write_json(folder / COSTS, {**groups_dict(groups), **costs.to_dict()})


def load_costs(folder: Path) -> tuple[Groups, Costs]:
    """Read what :func:`save_costs` wrote."""
    found = _read(folder / COSTS)
    groups = tuple(
        Group(entry["name"], tuple(Layer(**layer) for layer in entry["layers"]), entry["own"], tuple(entry["sizes"]))
        for entry in found["groups"]
    )
    return Groups(groups, tuple(found["notes"])), Costs.from_dict(found)


def choice_dict(choice: Choice) -> dict[str, Any]:
    """Return a choice in JSON's types."""
    found = dataclasses.asdict(choice)
    effects = {name: {str(size): value for size, value in row.items()} for name, row in choice.model.effects.items()}
    return {**found, "model": {**found["model"], "effects": effects}}


def load_choice(folder: Path) -> Choice:
    """Read ``choice.json``."""
    found = _read(folder / CHOICE)
    model = found.pop("model")
    effects = {name: {int(size): value for size, value in row.items()} for name, row in model.pop("effects").items()}
    candidates = tuple(
        Candidate(
            **{
                **entry,
                "sizes": tuple(entry["sizes"]),
                "to_best": Interval(**entry["to_best"]),
                "to_unchanged": Interval(**entry["to_unchanged"]),
            }
        )
        for entry in found.pop("candidates")
    )
    front = tuple(Point(tuple(entry["sizes"]), entry["cost"], entry["loss"]) for entry in found.pop("front"))
    sizes = tuple(found.pop("sizes"))
    return Choice(sizes=sizes, candidates=candidates, front=front, model=Additive(effects=effects, **model), **found)


def verdict_of(found: Mapping[str, Any]) -> Verdict:
    """Return a verdict from JSON's types."""
    rows: Sequence[Mapping[str, Any]] = found["sizes"]
    return Verdict(
        **{
            **found,
            "difference": Interval(**found["difference"]),
            "plain": Network(**found["plain"]),
            "unchanged": Network(**found["unchanged"]),
            "sizes": tuple(SizeRow(**{**row, "difference": Interval(**row["difference"])}) for row in rows),
            "notes": tuple(found["notes"]),
        }
    )
