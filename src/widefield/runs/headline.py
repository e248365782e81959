"""Say in words what evaluations of one run or several found: who is ahead, by how much, and what is not decided."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from widefield._intervals import Interval, interval, paired, wilson
from widefield.data.listing import counted
from widefield.runs.accuracy import Evaluation
from widefield.runs.compare import labels
from widefield.runs.records import RunRecord
from widefield.tasks import ClassificationScores, MultiLabelScores
from widefield.tasks.metric_names import lower_is_better, shown

_ONE_SEED = (
    "Intervals (95 %) say how far other images of the same kind may change a result. They do not say what another "
    "training with another seed would give: that takes several runs of each recipe."
)


@dataclass(frozen=True)
class Found:
    """An evaluation of a run on a choice of its validation images.

    Attributes:
        evaluation: with what was measured of each image.
        source: name of the data.
        headline: the task's metric.
        images: what the images are called.
    """

    evaluation: Evaluation
    source: str
    headline: str
    images: str = "validation image"

    @property
    def values(self) -> NDArray[np.float64] | None:
        """Return a number for each image, larger being better: its part of the headline, or else its rating."""
        each = self.evaluation.each
        if each is None:
            return None
        return each.ratings if each.parts is None else each.parts

    @property
    def is_share(self) -> bool:
        """Return whether the headline is a share of the images."""
        return self.evaluation.each is not None and self.evaluation.each.parts is not None

    def compares_with(self, other: Found) -> bool:
        """Return whether both evaluations measured the same of the same images."""
        mine, its = self.evaluation.each, other.evaluation.each
        if mine is None or its is None or (mine.parts is None) != (its.parts is None):
            return False
        alike = (self.source, self.headline) == (other.source, other.headline)
        return alike and np.array_equal(mine.places, its.places)


def evaluated_words(found: Mapping[str, Found]) -> list[str]:
    """Return paragraphs on evaluations of one run or several, by name; none without evaluations."""
    if not found:
        return []
    if len(found) == 1:
        return [*_alone(*next(iter(found.items()))), _ONE_SEED]
    if not all(one.compares_with(other) for one, other in itertools.pairwise(found.values())):
        alone = [sentence for name, one in found.items() for sentence in _alone(name, one)]
        return [*alone, "The runs were evaluated on different images or by different metrics, so none is ahead."]
    return [*_compared(found), _ONE_SEED]


def logged_words(runs: Sequence[RunRecord]) -> list[str]:
    """Return paragraphs on the last evaluation in the logs of runs, for runs whose images are missing."""
    values = [(name, run.headline, run.last()) for name, run in zip(labels(runs), runs, strict=True)]
    listed = "; ".join(f"{name}: {metric} {shown(metric, value)}" for name, metric, value in values)
    unknown = "" if len(runs) == 1 else " Whether they differ by more than chance cannot be said without the images."
    return [f"After the last evaluation in training, by the log: {listed}.{unknown}"]


def _alone(name: str, found: Found) -> list[str]:
    """Return a sentence about one run, and one about its weakest class."""
    evaluation = found.evaluation
    images = counted(evaluation.images, found.images)
    if found.values is None:
        value = shown(found.headline, evaluation.metrics.get(found.headline))
        return [f"{name} has a {found.headline} of {value} on {images} of {found.source}."]
    if not found.is_share:
        rated = f"{_capital(_measured(found))}: {_rating(found, found.values)}"
        sentence = f"{name} has {_metric(found)} on {images} of {found.source}. {rated}."
        return [f"{sentence} {_weakest(evaluation)}".strip()]
    right = int(found.values.sum())
    sentence = f"{name} classifies {right:,} of {images} of {found.source} correctly: {_share(found.values)}."
    weakest = _weakest(evaluation)
    return [f"{sentence} {weakest}".strip()]


def _weakest(evaluation: Evaluation) -> str:
    scores = evaluation.scores
    if isinstance(scores, MultiLabelScores):
        (row,) = scores.weakest(1)
        images = counted(int(row["images"]), "image")
        return f"The class with the lowest average precision is {row['class']}: {row['AP']} ({images})."
    if not isinstance(scores, ClassificationScores):
        return ""
    (row,) = scores.weakest(1)
    mistaken = "" if row["mistaken for"] == "-" else f", and is mistaken most often for {row['mistaken for']}"
    return (
        f"The class with the lowest accuracy is {row['class']}: {row['accuracy']} of {row['images']} (95 % interval "
        f"{row['95 %']} %){mistaken}."
    )


def _compared(found: Mapping[str, Found]) -> list[str]:
    """Return paragraphs on runs that were evaluated on the same images."""
    values: dict[str, NDArray[np.float64]] = {name: one.values for name, one in found.items() if one.values is not None}
    best, *others = sorted(values, key=lambda name: -values[name].mean())
    first = found[best]
    leads = {name: paired(values[best], values[name]) for name in others}
    decided = [name for name, lead in leads.items() if lead.excludes_zero]
    images = counted(first.evaluation.images, first.images)
    compared = f"{_listed(list(found))} were compared on the same {images} of {first.source}."
    results = "; ".join(f"{name} {_result(found[name], values[name])}" for name in (best, *others))
    if len(decided) == len(others):
        verdict = f"{best} is the best"
    elif decided:
        verdict = f"{best} has the highest result, and is better than {_listed(decided)}"
    else:
        verdict = "None of them is shown to be better than the others"
    pronounced = [_lead(best, name, lead, first) for name, lead in leads.items()]
    return [f"{compared} {verdict}. {_capital(_measured(first))}: {results}.", " ".join(pronounced)]


def _lead(best: str, name: str, lead: Interval, found: Found) -> str:
    """Return a sentence on how far the best run is ahead of another."""
    if not lead.mean and not lead.low and not lead.high:
        return f"{best} and {name} have the same result on every image: a tie."
    span = f"95 % interval of the difference {_text(lead.low, found)} to {_text(lead.high, found)}"
    if not lead.mean:
        return f"{best} and {name} have the same mean ({span}): a tie."
    unit = " points" if _in_percent(found) else ""
    ahead = f"{best} is ahead of {name} by {_text(lead.mean, found)}{unit} ({span})"
    return f"{ahead}." if lead.excludes_zero else f"{ahead}: that may be chance, so it is not decided."


def _measured(found: Found) -> str:
    """Return what the compared numbers are."""
    if found.is_share:
        return f"share of right images ({found.headline})"
    return f"each image is rated by {found.evaluation.rating}; mean rating"


def _result(found: Found, values: NDArray[np.float64]) -> str:
    return _share(values) if found.is_share else f"{_rating(found, values)}, with {_metric(found)}"


def _rating(found: Found, values: NDArray[np.float64]) -> str:
    mean = interval(values) if _in_percent(found) else interval(values).scaled(-1)
    unit = " %" if _in_percent(found) else ""
    span = f"{_text(mean.low, found)} to {_text(mean.high, found)}{unit}"
    return f"{_text(mean.mean, found)}{unit} (95 % interval {span})"


def _metric(found: Found) -> str:
    return f"{found.headline} {shown(found.headline, found.evaluation.metrics.get(found.headline))}"


def _share(values: NDArray[np.float64]) -> str:
    low, high = wilson(values.sum(), np.array(len(values))).tolist()
    return f"{100 * values.mean():.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"


def _in_percent(found: Found) -> bool:
    """Return whether ratings are shares; those of losses are the negative loss."""
    return not lower_is_better(found.headline)


def _text(value: float, found: Found) -> str:
    return f"{100 * value:.1f}" if _in_percent(found) else f"{value:.3g}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _capital(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}"
