"""Measure the effective receptive fields of detections: which part of the image makes them, by the size of objects.

GMConv (Chen, Li, Wang, Ouyang, Zhang 2023), figure 8: fields of detectors for objects of varying sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from widefield import _checks, report
from widefield.analysis._cam_figure import field_over
from widefield.analysis._detectors import check_detector
from widefield.analysis._model import track, visited
from widefield.analysis._objects import CELLS, SHARES, Colors, Group, ObjectExample, SizeGroup, looks
from widefield.analysis._result import Result
from widefield.data.listing import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from widefield.data import Sample, SampleSet

_FAINTEST = 1e-3
"""Lower end of the logarithmic color scale."""
_DOUBTFUL = 0.1
"""Mean probability below which a detector does not find the objects."""
_FARTHER = 1.25
"""Ratio from which fields of two sizes are said to differ."""
_UNITS = {"score": "class logit of its box", "center": "unit of the neck in its middle"}


@dataclass(frozen=True, eq=False)
class ObjectFields(Result):
    """The effective receptive fields of objects of a detector, averaged by the objects' size.

    Attributes:
        groups: objects by size, the smallest first; sizes without objects are left out.
        extent: of the fields: boxes from the middle to each side.
        unit: what was differentiated: ``"score"`` or ``"center"``.
        classes: names of the classes; empty if they are unknown.
    """

    title: ClassVar[str] = "Effective receptive fields of objects"
    lead: ClassVar[str] = (
        "Contribution of the image to the detection of an object, averaged over objects of similar size: the positive "
        "part of the gradient, summed over channels, each object counting equally. Each field is centered on the "
        "object's box, which is drawn dashed, and measured in units of it. Under each field: the share of the "
        "contributions inside of the box, and how much larger a box must be to hold half and 90 % of them (medians)."
    )
    examples: ClassVar[str] = (
        "The first object of each size, and the contributions to it, relative to the largest of each picture."
    )

    name: str
    about: Mapping[str, Any]
    groups: tuple[SizeGroup, ...]
    extent: float
    unit: str
    classes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return all values in JSON's types; fields are rounded to eight decimals, examples are left out."""
        found = super().to_dict()
        for group in found["groups"]:
            del group["example"]
            group["field"] = np.round(group["field"], 8).tolist()
        return found

    def rows(self) -> list[dict[str, str]]:
        """Return one row per size."""
        return [
            {
                "model": self.name,
                "objects": group.name,
                "number": str(group.objects),
                "side, px": f"{group.side:.0f}",
                "probability": f"{100 * group.probability:.1f}%",
                "inside the box": f"{100 * group.inside:.0f}%",
                **{f"{share:.0%} within, boxes": f"{factor:.2f}" for share, factor in group.reach.items()},
                **{f"{share:.0%} within, px": f"{side:.0f}" for share, side in group.reach_pixels.items()},
            }
            for group in self.groups
        ]

    @classmethod
    def reading(cls, results: Mapping[str, ObjectFields]) -> str:
        """Return how far beyond their boxes objects of each size are seen, and whether the detector finds them."""
        return " ".join(_read(name, result) for name, result in results.items())

    @classmethod
    @report.paper()
    def draw(cls, results: Mapping[str, ObjectFields]) -> Figure:
        """Draw one row per model and one column per size, on one color scale (GMConv, figure 8)."""
        table, names, figure, axes = _panels(results, below=0.6)
        shown: AxesImage | None = None
        # Densities per box's area, so that colors do not depend on the extent.
        densest = max(_density(group, result).max() for result, row in table for group in row if group)
        for row, (result, groups) in zip(axes, table, strict=True):
            for axis, group in zip(row, groups, strict=True):
                if group is None:
                    axis.axis("off")
                    continue
                shown = _draw_field(axis, group, result, densest)
            row[0].set_ylabel(names[result.name], fontsize=8)
        _title(axes[0], table[0][1])
        if shown is not None:
            bar = figure.colorbar(shown, ax=axes, aspect=25 * len(table), pad=0.04, extend="min")
            bar.set_label("contribution, relative to the largest")
            bar.outline.set_visible(False)
        figure.supxlabel("boxes from the middle of the object", fontsize=8)
        return figure

    @classmethod
    @report.paper()
    def draw_examples(cls, results: Mapping[str, ObjectFields]) -> Figure:
        """Draw the first object of each size with the contributions to it: one row per model."""
        table, names, figure, axes = _panels(results, below=0.2)
        for row, (result, groups) in zip(axes, table, strict=True):
            for axis, group in zip(row, groups, strict=True):
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
                if group is not None:
                    _draw_example(axis, group.example, result.classes)
            row[0].set_ylabel(names[result.name], fontsize=8)
        _title(axes[0], table[0][1])
        return figure

    @classmethod
    def figures(cls, results: Mapping[str, ObjectFields], **options: Any) -> dict[str, Figure]:
        """Return the figures of a page, by caption."""
        return {cls.lead: cls.draw(results), cls.examples: cls.draw_examples(results)}


@_checks.guided
def object_receptive_fields(
    model: nn.Module,
    images: SampleSet | Iterable[Sample | None],
    *,
    unit: str = "score",
    sizes: Sequence[float] = (32, 96),
    count: int = 24,
    extent: float = 3.0,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> ObjectFields:
    """Measure which part of the image makes the detections of objects, by the size of the objects.

    For each object, the score of its class in its box is differentiated with respect to the image; see
    :class:`DetectionScore` for what this score is. The box is held fixed: the gradient flows through the feature maps
    only. Negative gradients are dropped, the rest is summed over channels and scaled to a sum of 1. The fields are
    moved to the middle of their boxes, measured in units of width and height of the box, and averaged. With true boxes
    every model is asked about the same objects, whether or not it detects them.

    A second stage pools the features inside of the box, so the field of a score covers at least the box. ``"center"``
    leaves the head out and shows backbone and neck alone: it takes the unit in the middle of the box, all channels
    summed, on the map of the neck that a two-stage detector uses for boxes of this size (Lin et al. 2017, equation 1).

    Args:
        model: a detector of ``widefield.dense``.
        images: samples with ``image`` float (C, h, w), normalized; ``boxes`` (M, 4) in pixels of the file, ``labels``
            (M,), and if they have it ``size`` (2,), the (height, width) of the file, and ``crowd`` (M,): a val split of
            a detection set, or a part of one. With attributes ``mean`` and ``std`` examples have the images' colors.
        unit: ``"score"``, the class's logit of the box; or ``"center"``, the unit of the neck in the middle of the box.
        sizes: edges between the groups of objects by size: square roots of the boxes' areas, in pixels of ``image``.
        count: largest number of objects in a group; the first ones.
        extent: how many boxes a field extends from the middle to each side.
        classes: names of the classes.
        name: the model's name in tables and figures. Default: its class name.
        about: facts to store with the result.
        progress: show a progress bar.

    Raises:
        ValueError: the model is not a detector, there are no objects, or an argument is out of range.
        TypeError: samples or arguments have the wrong type.
    """
    check_detector(model, "object_receptive_fields")
    _checks.choice("unit", unit, tuple(_UNITS))
    edges = edges_of(sizes)
    _checks.integer("count", count)
    if _checks.number("extent", extent) < 0.5:
        raise ValueError(f"extent must be at least 0.5, which is the box itself; got {extent}.")
    if isinstance(images, Tensor):
        raise TypeError("images must be samples with boxes and labels, such as a detection set; got a tensor.")
    colors = Colors(getattr(images, "mean", ()), getattr(images, "std", ()))
    groups = [Group(name, extent) for name in ranges(edges)]
    seen = 0
    with visited(model):
        for sample in track(each(images), "fields of objects", total=length_of(images), show=progress):
            if sample is None:
                continue
            seen += 1
            for look in looks(model, sample, unit, edges, groups, count):
                groups[look.group].add(look, colors)
            if all(len(group.inside) >= count for group in groups):
                break
    found = tuple(group.result() for group in groups if group.inside)
    if not found:
        raise ValueError(f"there are no objects in {seen} images: give images with boxes that are not crowd regions.")
    return ObjectFields(
        name=name or type(model).__name__,
        about={**(about or {}), "images": seen, "of each object": _UNITS[unit], "extent": extent},
        groups=found,
        extent=float(extent),
        unit=unit,
        classes=tuple(classes or ()),
    )


def edges_of(sizes: Sequence[float]) -> list[float]:
    """Return the edges between sizes; raises ValueError unless they are positive and rising."""
    edges = [_checks.number("every entry of sizes", size) for size in sizes]
    if edges != sorted(set(edges)) or (edges and edges[0] <= 0):
        raise ValueError(f"sizes must be positive and in increasing order; got {list(sizes)}.")
    return edges


def ranges(edges: Sequence[float]) -> list[str]:
    """Return the range of sizes of each group as text."""
    if not edges:
        return ["all sizes"]
    inner = [f"{low:g} to {high:g} px" for low, high in itertools.pairwise(edges)]
    return [f"below {edges[0]:g} px", *inner, f"{edges[-1]:g} px and more"]


def each(images: Any) -> Iterable[Sample | None]:
    """Yield the samples of a data set, or of another iterable."""
    return images if hasattr(images, "__iter__") else (images[index] for index in range(len(images)))


def length_of(images: Any) -> int | None:
    """Return the number of samples, or None if it is unknown."""
    return len(images) if hasattr(images, "__len__") else None


# Words


def _read(name: str, result: ObjectFields) -> str:
    """Return what the fields of a detector show."""
    first, *rest = (
        (of_size("an object", group.name), group, f"({counted(group.objects, 'object')})") for group in result.groups
    )
    most = SHARES[-1]
    words = (
        f"{name}: of the contributions to {first[0]}, {first[1].inside:.0%} come from inside its box and {most:.0%} "
        f"from a box {first[1].reach[most]:.1f} times as wide and high {first[2]}"
    )
    for what, group, number in rest:
        words += f"; to {what}, {group.inside:.0%} and {group.reach[most]:.1f} times {number}"
    words += "."
    if len(result.groups) > 1:
        near, far = sorted((result.groups[0], result.groups[-1]), key=lambda group: group.reach[most])
        if far.reach[most] >= _FARTHER * near.reach[most]:
            words += f" Relative to its box, {of_size('an object', far.name)} is seen with more of its surroundings."
    total = sum(group.objects for group in result.groups)
    chance = sum(group.probability * group.objects for group in result.groups) / total
    if chance < _DOUBTFUL:
        words += (
            f" The detector gives the true classes a probability of {100 * chance:.2g}% on average: these are fields "
            "of objects that it hardly finds."
        )
    return words


def of_size(what: str, size: str) -> str:
    """Return a noun with one of :func:`ranges`, such as ``an object below 32 px``."""
    if size == ranges(())[0]:
        return what
    return f"{what} {size}" if size.startswith("below") else f"{what} of {size}"


# Figures

_Row = tuple[ObjectFields, list[SizeGroup | None]]


def _panels(results: Mapping[str, ObjectFields], below: float) -> tuple[list[_Row], dict[str, str], Figure, Any]:
    """Return the groups of each model in columns by size, names for the rows, a figure and its axes (rows, columns)."""
    known = {group.name: group.side for result in results.values() for group in result.groups}
    columns = sorted(known, key=lambda size: known[size])
    table: list[_Row] = []
    names: dict[str, str] = {}
    for title, result in results.items():
        by_name = {group.name: group for group in result.groups}
        table.append((result, [by_name.get(size) for size in columns]))
        names[result.name] = title if len(title) <= 28 else f"{title[:27]}…"
    width = min(report.PAGE, 1.9 * len(columns) + 0.8)
    side = (width - 0.8) / len(columns) - 0.1
    figure = report.blank(width, len(table) * (side + below) + 0.5)
    return table, names, figure, figure.subplots(len(table), len(columns), squeeze=False)


def _title(axes: Sequence[Axes], groups: Sequence[SizeGroup | None]) -> None:
    for axis, group in zip(axes, groups, strict=True):
        if group is not None:
            axis.set_title(f"objects {group.name}")


def _density(group: SizeGroup, result: ObjectFields) -> NDArray[np.float64]:
    """Return the contributions per area of a box."""
    density: NDArray[np.float64] = group.field * (CELLS / (2 * result.extent)) ** 2
    return density


def _draw_field(axis: Axes, group: SizeGroup, result: ObjectFields, densest: float) -> AxesImage:
    edge = result.extent
    values = np.maximum(_density(group, result) / densest, _FAINTEST)
    shown = axis.imshow(values, extent=(-edge, edge, edge, -edge), cmap="magma_r", norm="log", vmin=_FAINTEST, vmax=1.0)
    _draw_box(axis, (-0.5, -0.5, 0.5, 0.5), "--")
    axis.locator_params(nbins=3)
    half, most = (group.reach[share] for share in SHARES)
    axis.set_xlabel(
        f"{group.objects} objects of {group.side:.0f} px\n{100 * group.inside:.0f} % inside the box\n"
        f"half within {half:.1f} boxes\n90 % within {most:.1f} boxes",
        fontsize=6,
    )
    return shown


def _draw_example(axis: Axes, example: ObjectExample, classes: Sequence[str]) -> None:
    field_over(axis, example.image, example.field, _FAINTEST)
    left, top, right, bottom = np.array(example.box) - 0.5
    _draw_box(axis, (left, top, right, bottom), "-")
    h, w = example.field.shape
    axis.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5))
    label = classes[example.label] if classes else f"class {example.label}"
    axis.set_xlabel(f"{label[:20]}, {100 * example.probability:.2g} %", fontsize=6.5)


def _draw_box(axis: Axes, box: tuple[float, float, float, float], line: str) -> None:
    """Outline a box in a color that is seen on dark and on light."""
    left, top, right, bottom = box
    across, down = [left, right, right, left, left], [top, top, bottom, bottom, top]
    axis.plot(across, down, color="w", linewidth=2)
    axis.plot(across, down, line, color=report.COLORS[0], linewidth=1)
