"""Measure from how far a pose model sees each key point: effective receptive fields, averaged over people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from widefield import _checks, report
from widefield.analysis._cam_figure import field_over
from widefield.analysis._keypoints import check_pose_model
from widefield.analysis._model import track, visited
from widefield.analysis._objects import SHARES, Colors
from widefield.analysis._people import Group, Groups, KeypointExample, KeypointGroup, looks
from widefield.analysis._result import Result
from widefield.analysis._targets import keypoint_text
from widefield.analysis.objects import each, edges_of, length_of, of_size, ranges

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from widefield.data import Sample, SampleSet

_FAINTEST = 1e-3
"""Lower end of the logarithmic color scale."""
_DOUBTFUL = 0.5
"""Share of key points below which a model does not find them."""
_APART = 1.1
"""Ratio from which radii are said to differ."""
_WIDEST = 6
"""Largest number of pictures side by side."""


@dataclass(frozen=True, eq=False)
class KeypointFields(Result):
    """The effective receptive fields of a pose model's key points, averaged over people by key point and size.

    Attributes:
        groups: by key point, then by size, the smallest first; those without people are left out.
        extent: of the fields: sides of the box from the peak to each side.
        names: of the key points; empty if they are unknown.
    """

    title: ClassVar[str] = "Effective receptive fields of key points"
    lead: ClassVar[str] = (
        "From how far a pose model sees each key point: the radius around the peak of its heatmap that holds half of "
        "all contributions (dot) and 90 % of them (end of the line), in units of the longer side of the person's box. "
        "Contributions of the crop to the peak are the positive part of the gradient, summed over channels. Medians "
        "over people, by their size in the file (square root of the area)."
    )
    fields: ClassVar[str] = (
        "The fields, centered on the peak (cross), averaged over all people, relative to the largest of each model; "
        "the axes count longer sides of the person's box."
    )
    examples: ClassVar[str] = (
        "The first person of each key point, and the contributions to the peak (cross), relative to the largest of "
        "each picture. The circle is the true key point."
    )

    name: str
    about: Mapping[str, Any]
    groups: tuple[KeypointGroup, ...]
    extent: float
    names: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return all values in JSON's types; fields are rounded to eight decimals, examples are left out."""
        found = super().to_dict()
        for group in found["groups"]:
            del group["example"]
            group["field"] = np.round(group["field"], 8).tolist()
        return found

    def rows(self) -> list[dict[str, str]]:
        """Return one row per key point and size."""
        return [
            {
                "model": self.name,
                "key point": self.text(group),
                "people": group.size,
                "number": str(group.people),
                "found": f"{group.found:.0%}",
                "peak": f"{group.height:.2f}",
                **{f"{share:.0%} within, boxes": f"{radius:.2f}" for share, radius in group.reach.items()},
                **{f"{share:.0%} within, px": f"{radius:.0f}" for share, radius in group.reach_pixels.items()},
            }
            for group in self.groups
        ]

    def text(self, group: KeypointGroup) -> str:
        """Return the name of a group's key point."""
        return keypoint_text(group.keypoint, self.names)

    def keypoints(self) -> list[int]:
        """Return the indices of the key points, rising."""
        return sorted({group.keypoint for group in self.groups})

    def field(self, keypoint: int) -> NDArray[np.float64]:
        """Return the field of a key point, averaged over all people, (96, 96)."""
        own = [group for group in self.groups if group.keypoint == keypoint]
        mean: NDArray[np.float64] = np.average([g.field for g in own], 0, [g.people for g in own])
        return mean

    @classmethod
    def reading(cls, results: Mapping[str, KeypointFields]) -> str:
        """Return from how far key points are seen, which from the farthest, and whether the model finds them."""
        return " ".join(_read(name, result) for name, result in results.items())

    @classmethod
    @report.paper()
    def draw(cls, results: Mapping[str, KeypointFields]) -> Figure:
        """Draw the radii of every key point: one panel per model, one color per size."""
        sizes = list(dict.fromkeys(group.size for result in results.values() for group in result.groups))
        sizes.sort(key=lambda size: _order(size, results))
        longest = max(len(result.keypoints()) for result in results.values())
        step = 0.09 * len(sizes) + 0.1
        width = min(report.PAGE, 2.4 * len(results) + 1.6)
        figure = report.blank(width, longest * step + 1.0)
        axes = figure.subplots(1, len(results), squeeze=False, sharex=True)[0]
        for axis, (title, result) in zip(axes, results.items(), strict=True):
            _draw_radii(axis, result, sizes)
            axis.set_title(title if len(title) <= 40 else f"{title[:39]}…")
        figure.supxlabel("longer sides of the person's box, from the peak", fontsize=8)
        if len(sizes) > 1:
            handles, labels = _legend(sizes)
            figure.legend(handles, labels, loc="outside upper center", ncols=len(sizes), frameon=False, fontsize=7)
        return figure

    @classmethod
    @report.paper()
    def draw_fields(cls, results: Mapping[str, KeypointFields]) -> Figure:
        """Draw the fields averaged over people: the key points of each model in rows of up to six."""
        figure, panels = _grid(results)
        for result, keypoint, axis in panels:
            edge = result.extent
            largest = max(result.field(k).max() for k in result.keypoints())
            values = np.maximum(result.field(keypoint) / largest, _FAINTEST)
            axis.imshow(values, extent=(-edge, edge, edge, -edge), cmap="magma_r", norm="log", vmin=_FAINTEST, vmax=1.0)
            axis.plot(0, 0, "+", color="cyan", markersize=5)
            axis.locator_params(nbins=3)
            axis.set_title(keypoint_text(keypoint, result.names), fontsize=7)
        return figure

    @classmethod
    @report.paper()
    def draw_examples(cls, results: Mapping[str, KeypointFields]) -> Figure:
        """Draw the first person of each key point with the contributions to its peak, in rows of up to six."""
        figure, panels = _grid(results)
        for result, keypoint, axis in panels:
            example = next(group.example for group in result.groups if group.keypoint == keypoint)
            _draw_example(axis, example)
            axis.set_title(keypoint_text(keypoint, result.names), fontsize=7)
        return figure

    @classmethod
    def figures(cls, results: Mapping[str, KeypointFields], **options: Any) -> dict[str, Figure]:
        """Return the figures of a page, by caption."""
        return {
            cls.lead: cls.draw(results),
            cls.fields: cls.draw_fields(results),
            cls.examples: cls.draw_examples(results),
        }


@_checks.guided
def keypoint_receptive_fields(
    model: nn.Module,
    images: SampleSet | Iterable[Sample | None],
    *,
    keypoints: Sequence[int] | None = None,
    sizes: Sequence[float] = (32, 96),
    count: int = 24,
    extent: float = 0.75,
    batch_size: int = 8,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> KeypointFields:
    """Measure from how far a pose model sees each key point, by key point and by the size of people.

    For each labeled key point of a person, the value of its heatmap at the peak is differentiated with respect to the
    crop. Negative gradients are dropped, the rest is summed over channels and scaled to a sum of 1. The radius around
    the peak that holds a share of these contributions says from how far the model sees the key point. Radii are in
    pixels of the crop, and in units of the longer side of the person's box there, so that crops of any size compare.

    Args:
        model: a pose model, such as ``widefield.dense.HeatmapPose``.
        images: samples with ``image`` float (C, h, w), normalized, and ``keypoints`` (K, 3) in its pixels: the val
            split of a pose set, or a part of one. With ``area`` people are grouped by size, with ``box`` and ``affine``
            the box is known (else it is the crop). With attributes ``mean`` and ``std`` examples have the images'
            colors.
        keypoints: indices of those to measure. Default: all.
        sizes: edges between the groups of people: square roots of their areas, in pixels of the file.
        count: largest number of people for each key point and size; the first ones.
        extent: how many sides of the box a field extends from the peak to each side.
        batch_size: key points at a time.
        classes: names of the key points.
        name: the model's name in tables and figures. Default: its class name.
        about: facts to store with the result.
        progress: show a progress bar.

    Raises:
        ValueError: the model is not a pose model, there are no labeled key points, or an argument is out of range.
        TypeError: samples or arguments have the wrong type.
    """
    check_pose_model(model, "keypoint_receptive_fields")
    pose: Any = model
    _checks.integer("count", count)
    _checks.integer("batch_size", batch_size)
    if not _checks.number("extent", extent):
        raise ValueError("extent must be above 0, as a field has no cells; got 0.")
    if classes and len(classes) != pose.num_keypoints:
        raise ValueError(f"classes has {len(classes)} names, but the model has {pose.num_keypoints} key points.")
    if isinstance(images, Tensor):
        raise TypeError("images must be samples with key points, such as a pose set; got a tensor.")
    last = pose.num_keypoints - 1
    wanted = range(last + 1) if keypoints is None else keypoints
    wanted = [_checks.integer("every entry of keypoints", k, minimum=0, maximum=last) for k in wanted]
    edges = edges_of(sizes)
    groups = {(k, s): Group(k, size, extent) for k in wanted for s, size in enumerate(ranges(edges))}
    colors = Colors(getattr(images, "mean", ()), getattr(images, "std", ()))
    seen = _filled(model, images, groups, edges, count, batch_size, colors, progress=progress)
    found = tuple(group.result() for group in groups.values() if group.people)
    if not found:
        raise ValueError(f"there is no labeled key point in {seen} crops: give samples with key points in the crop.")
    return KeypointFields(
        name=name or type(model).__name__,
        about={**(about or {}), "crops": seen, "of each key point": "value of its heatmap at the peak"},
        groups=found,
        extent=float(extent),
        names=tuple(classes or ()),
    )


def _filled(
    model: nn.Module,
    images: Any,
    groups: Groups,
    edges: Sequence[float],
    count: int,
    batch_size: int,
    colors: Colors,
    *,
    progress: bool,
) -> int:
    """Add people to the groups until they are full; return the number of samples read."""
    seen = 0
    with visited(model):
        for sample in track(each(images), "fields of key points", total=length_of(images), show=progress):
            if sample is None:
                continue
            if "keypoints" not in sample:
                raise TypeError("images must be samples with key points, such as a pose set; there are none.")
            seen += 1
            area = float(sample["area"]) if "area" in sample else 0.0
            size = int(np.searchsorted(edges, max(area, 0.0) ** 0.5, side="right"))
            for look in looks(model, sample, size, groups, count, batch_size):
                groups[look.group].add(look, colors)
            if all(group.people >= count for group in groups.values()):
                break
    return seen


# Words


def _read(name: str, result: KeypointFields) -> str:
    """Return what the fields of a pose model show."""
    half, most = (_mean_reach(result.groups, share) for share in SHARES)
    words = (
        f"{name}: half of the contributions to a key point come from within {half:.2f} of the longer side of the "
        f"person's box around it, and 90% from within {most:.2f}."
    )
    by_keypoint = {
        keypoint_text(k, result.names): _mean_reach([g for g in result.groups if g.keypoint == k], SHARES[-1])
        for k in result.keypoints()
    }
    words += _ends("The 90% reach least far for {0} ({1:.2f}) and farthest for {2} ({3:.2f}).", by_keypoint)
    sizes = dict.fromkeys(group.size for group in result.groups)
    by_size = {
        of_size("people", size): _mean_reach([g for g in result.groups if g.size == size], SHARES[-1]) for size in sizes
    }
    words += _ends("By size they reach least far for {0} ({1:.2f}) and farthest for {2} ({3:.2f}).", by_size)
    found = sum(group.found * group.people for group in result.groups) / sum(group.people for group in result.groups)
    if found < _DOUBTFUL:
        words += f" The model finds {found:.0%} of these key points: most fields belong to a peak at a wrong place."
    return words


def _ends(text: str, values: Mapping[str, float]) -> str:
    """Return a text on the smallest and the largest of several values, with a space before it; "" if they are alike."""
    least, most = (chosen(values, key=lambda name: values[name]) for chosen in (min, max))
    if values[most] < _APART * values[least]:
        return ""
    return " " + text.format(least, values[least], most, values[most])


def _mean_reach(groups: Sequence[KeypointGroup], share: float) -> float:
    """Return the mean radius over people: groups of different sizes count as often as they have people."""
    return float(np.average([group.reach[share] for group in groups], weights=[group.people for group in groups]))


# Figures


def _order(size: str, results: Mapping[str, KeypointFields]) -> float:
    """Return where a range of sizes comes: by its lower edge, which its text starts with."""
    return 0.0 if size.startswith(("below", "all")) else float(size.split()[0])


def _draw_radii(axis: Axes, result: KeypointFields, sizes: Sequence[str]) -> None:
    keypoints = result.keypoints()
    for group in result.groups:
        number = sizes.index(group.size)
        y = keypoints.index(group.keypoint) + 0.7 * ((number + 0.5) / len(sizes) - 0.5)
        half, most = (group.reach[share] for share in SHARES)
        color = report.COLORS[number % len(report.COLORS)]
        axis.plot([half, most], [y, y], color=color, linewidth=1.2)
        axis.plot(half, y, "o", color=color, markersize=3.5)
        axis.plot(most, y, "|", color=color, markersize=5)
    axis.set_yticks(range(len(keypoints)), [keypoint_text(k, result.names) for k in keypoints])
    axis.set_ylim(len(keypoints) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.grid(axis="x", linewidth=0.4)


def _legend(sizes: Sequence[str]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=report.COLORS[k % len(report.COLORS)], marker="o", markersize=3.5)
        for k in range(len(sizes))
    ]
    return lines, list(sizes)


def _grid(results: Mapping[str, KeypointFields]) -> tuple[Figure, list[tuple[KeypointFields, int, Axes]]]:
    """Return a figure and a panel for each key point of each model, in rows of up to six."""
    columns = min(_WIDEST, max(len(result.keypoints()) for result in results.values()))
    lines = [
        (title, result, result.keypoints()[start : start + columns])
        for title, result in results.items()
        for start in range(0, len(result.keypoints()), columns)
    ]
    width = min(report.PAGE, 1.3 * columns + 0.4)
    side = (width - 0.4) / columns
    first = next(iter(results.values())).groups[0].example.field
    tall = max(1.0, first.shape[0] / first.shape[1])
    figure = report.blank(width, len(lines) * (side * tall + 0.25) + 0.2)
    axes = figure.subplots(len(lines), columns, squeeze=False)
    panels = []
    for row, (title, result, keypoints) in zip(axes, lines, strict=True):
        for axis in row[len(keypoints) :]:
            axis.axis("off")
        panels += [(result, keypoint, axis) for keypoint, axis in zip(keypoints, row, strict=False)]
        if len(results) > 1 and keypoints[0] == result.keypoints()[0]:
            row[0].set_ylabel(title[:28], fontsize=7)
    return figure, panels


def _draw_example(axis: Axes, example: KeypointExample) -> None:
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    field_over(axis, example.image, example.field, _FAINTEST)
    axis.plot(*example.label, "o", markerfacecolor="none", markeredgecolor="cyan", markersize=6, markeredgewidth=0.8)
    axis.plot(*example.peak, "+", color="cyan", markersize=6, markeredgewidth=1)
    h, w = example.field.shape
    axis.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5))
