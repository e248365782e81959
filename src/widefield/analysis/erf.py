"""Measure effective receptive fields: the pixels that a unit responds to.

Ding et al. 2022 (RepLKNet), section 5, figure 1 and appendix B.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from widefield import _checks, report
from widefield.analysis._detectors import DetectionScore
from widefield.analysis._keypoints import KeypointPeak
from widefield.analysis._model import Layer, chunks, is_size, made_up, track, visited
from widefield.analysis._result import Result
from widefield.analysis._targets import ClassAt, ClassIn
from widefield.analysis._units import OUTPUT, chosen
from widefield.analysis.theoretical import Field, Position

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
"""Shares of all contributions whose area is reported, as in the paper's table."""

_FAINTEST = 1e-4
_ALIKE = 1.1  # largest ratio of areas that counts as no difference
"""Lower end of the logarithmic color scale."""

_NOISES = 8
"""Number of noise images for a given size."""

_WIDEST = 5
"""Largest number of panels side by side."""


@dataclass(frozen=True)
class ReceptiveField(Result):
    """The effective receptive field of one unit, averaged over images.

    Attributes:
        scores: (H, W), float64: contribution of each pixel to the unit, scaled to a maximum of 1.
        peak: the maximum before scaling, per image: ``peak * scores`` are the paper's sums of gradients.
        area_ratio: for a share of all contributions, the share of the image's area covered by the smallest square that
            is centered on the theoretical field and holds that share. Independent of the gradients' magnitude.
        log_area_ratio: the same for ``log10(peak * scores + 1)``, as in the paper's table. It depends on the magnitude:
            larger gradients have a flatter logarithm and a larger area.
        sigma_x, sigma_y: standard deviations in pixels of the maximum-likelihood Gaussian, which has the scores' second
            moments. Long tails count; the image's border cuts them off.
        theoretical: the theoretical receptive field of the same unit.
        clipped: how many (rows, columns) of the theoretical field lie in the image.
        layer: name of the layer; "" if a class logit was differentiated.
        position: (row, column) of the unit on the layer's map; of a class logit the pixel, or the middle of the region.
        of: the class and its pixel, region or box, as text; "" if a layer's unit was differentiated.
        box: (left, top, right, bottom) in pixels of the box whose score was differentiated; None for other units.
    """

    title: ClassVar[str] = "Effective receptive fields"
    lead: ClassVar[str] = (
        "By how much each pixel changes one unit: that of the table, in the middle of a map, or a class logit, or the "
        "peak of a key point. The wider the patch that stands out, the farther the unit looks; stripes and grids come "
        "from strides. Drawn is the positive part of the gradient, summed over channels and images, relative to the "
        "largest. Under each field: the share of the image's area covered by the smallest centered square that holds "
        "20, 30, 50 and 99 % of all contributions; and the theoretical receptive field, dashed if it fits."
    )

    name: str
    about: Mapping[str, Any]
    scores: np.ndarray
    peak: float
    area_ratio: Mapping[float, float]
    log_area_ratio: Mapping[float, float]
    sigma_x: float
    sigma_y: float
    theoretical: Field
    clipped: tuple[int, int]
    layer: str
    position: tuple[int, int]
    of: str = ""
    box: tuple[float, float, float, float] | None = None

    @property
    def size(self) -> str:
        """The images' size as text: "224", or "224x320" (rows, columns)."""
        return _sides(self.scores.shape)

    def logarithmic(self) -> np.ndarray:
        """Return ``log10(A + 1)`` of the per-image gradient sums A, scaled to a maximum of 1 (figure 1)."""
        return _logarithmic(self.scores, self.peak)

    def to_dict(self) -> dict[str, Any]:
        """Return all values in JSON's types; scores are rounded to six decimals."""
        return {**super().to_dict(), "scores": np.round(self.scores, 6).tolist()}

    def rows(self) -> list[dict[str, str]]:
        """Return one row: the area ratios, the Gaussian's sigmas and the theoretical field."""
        ratios = {f"{share:.0%} in": f"{ratio:.1%}" for share, ratio in self.area_ratio.items()}
        return [
            {
                "model": self.name,
                "layer": self.of or self.layer or OUTPUT,
                "size, px": self.size,
                "images": str(self.about["images"]),
                **ratios,
                "sigma x/y, px": f"{self.sigma_x:.1f}/{self.sigma_y:.1f}",
                "theory, px": _extent(self.theoretical, "whole"),
            }
        ]

    @classmethod
    def reading(cls, results: Mapping[str, ReceptiveField]) -> str:
        """Return which part of the image half of all contributions come from, and whose field is the largest."""
        half = {name: result.area_ratio[0.5] for name, result in results.items() if 0.5 in result.area_ratio}
        if not half:
            return ""
        parts = ", ".join(f"{_percent(ratio)} % of the image's area for {name}" for name, ratio in half.items())
        words = f"Half of all contributions come from a square of {parts}."
        if len(half) == 1:
            return words
        far = max(half, key=lambda name: half[name])
        alike = half[far] <= _ALIKE * min(half.values())
        return f"{words} {'The fields are about as large.' if alike else f'{far} looks the farthest.'}"

    @classmethod
    @report.paper()
    def draw(cls, results: Mapping[str, ReceptiveField], *, log: bool = True) -> Figure:
        """Draw the fields on one color scale; models at several sizes form a grid.

        Args:
            results: by title of their panel. In a grid, the results' own names and sizes are used instead.
            log: use a logarithmic color scale, down to 1e-4 of the maximum. (The paper colors log10(A + 1), which
                depends on the magnitude of gradients: :meth:`logarithmic`.)
        """
        table = _table(results)
        columns = len(table[0])
        width = min(report.PAGE, max(report.COLUMN, 1.75 * columns + 0.6))
        side = (width - 0.75) / columns - 0.1
        headings = [[_wrapped(entry[0], int(side * 14)) if entry else "" for entry in line] for line in table]
        lines = [max(heading.count("\n") for heading in line) for line in headings]
        figure = report.blank(width, len(table) * (side + 0.8) + 0.14 * sum(lines) + 0.3)
        axes = figure.subplots(len(table), columns, squeeze=False)
        shown: AxesImage | None = None
        for entry, heading, axis in zip(chain(*table), chain(*headings), axes.flat, strict=True):
            if entry is None:
                axis.axis("off")
            else:
                shown = _draw_one(axis, heading, entry[1], log=log)
        for places in axes:  # panels of equal height share the labels of their rows
            if len({axis.get_ylim() for axis in places if axis.images}) == 1:
                for axis in places[1:]:
                    axis.tick_params(labelleft=False)
        if shown is not None:
            bar = figure.colorbar(shown, ax=axes, aspect=25 * len(table), pad=0.01, extend="min" if log else "neither")
            bar.set_label("contribution, relative to the largest")
            bar.outline.set_visible(False)
        figure.supxlabel("pixels from the center of the theoretical field", fontsize=8)
        return figure


@_checks.guided
def effective_receptive_field(
    model: nn.Module,
    images: Tensor | Iterable[Any] | int | Sequence[int],
    *,
    layer: Layer | None = None,
    position: Position = "center",
    targets: ClassAt | ClassIn | DetectionScore | KeypointPeak | None = None,
    classes: Sequence[str] | None = None,
    batch_size: int = 8,
    name: str | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> ReceptiveField:
    """Measure how much each pixel contributes to one unit of a feature map (RepLKNet, section 5 and appendix B).

    With ``targets``, measure the same for a segmentation model's answer: the logit of one class at one pixel
    (`ClassAt`), or its mean over a region (`ClassIn`), at the images' resolution. Or for a detector of
    ``widefield.dense``: the logit of one box (`DetectionScore`), which shows what part of the image made a detection.
    The squares of the area ratios are then centered on that pixel, region or box. To average over many objects, see
    :func:`object_receptive_fields`. Or for a pose model: the height of one key point's peak (`KeypointPeak`) in one
    image; :func:`keypoint_receptive_fields` averages over people.

    The unit's channels are summed and differentiated with respect to each image. Negative gradients are dropped; the
    rest is summed over channels and images. The authors' script also drops negative outputs before it sums the
    channels. The paper does not, and neither does this function.

    The squares of the area ratios are centered on the theoretical field, or on the unit's share of the image if that
    field is unknown. This need not be the middle of the image: unit 3 of 7 of a ResNet looks at pixel 96 of 224.

    Weights matter. Where residual branches start at zero (the last norm of timm's ResNets, the layer scale of
    ConvNeXt), an untrained network sees only what its shortcuts see.

    Args:
        model: any model whose layer returns a map that keeps the images' proportions: (N, C, h, w), (N, h, w, C), or
            tokens (N, L, C).
        images: normalized images (N, C, H, W), or batches of them, all of one size. A size (224 or (rows, columns))
            stands for eight fixed images of normal noise, with the channels of the model's first convolution. Video
            clips (N, C, T, H, W) are summed over time.
        layer: the layer whose map is examined, or its name. Default: the last layer of the backbone that returns a
            map (:func:`widefield.surgery.anatomy.anatomy`). Layers whose channels always sum to a constant, as
            after a freshly initialized layer norm, are skipped.
        position: "center", which is (h // 2, w // 2), or (row, column) on the map, from 0.
        targets: what a segmentation model, a detector or a pose model is asked about, instead of a layer's unit:
            ``ClassAt()`` is the class with the largest logit in the middle of the image, ``DetectionScore()`` an
            image's best detection, ``KeypointPeak()`` the key point with the highest peak.
        classes: class names, or names of key points, in the order of the outputs, for the table.
        batch_size: images at a time.
        name: the model's name in tables and figures. Default: its class name.
        about: facts to store with the result.
        progress: show a progress bar.

    Raises:
        ValueError: there are no images, or they differ in size; the model rejects their size; the layer does not exist
            or returns no map; its gradient is missing, not finite or nowhere positive; the position lies outside the
            map. Or targets are given for a model that returns no map of logits, next to a layer or a position, or
            outside the image; a class is out of range, or the names do not match; there is no such detection, or there
            are detections of several images.
        TypeError: images, layer, position or targets have the wrong type.
    """
    _checks.integer("batch_size", batch_size)
    unit = chosen(model, layer, position, targets, classes)
    if isinstance(images, int) or is_size(images):
        images = made_up(model, images, _NOISES, noise=True)
        about = {"source": "noise", **(about or {})}
    parts = chunks(images, model, batch_size, clips=True)
    first = next(parts)
    size = tuple(first.shape[1:])
    with visited(model):
        found = unit.first(first)
        later = (unit.look(part).gradient for part in _of_one_size(parts, size))
        gradients = track(chain([found.gradient], later), "effective receptive field", show=progress)
        mean, count = _contributions(gradients, unit.where)
    if not mean.any():
        raise ValueError(
            f"no pixel has a positive gradient in {unit.where}: the unit {found.unit} is dead or sees nothing of the "
            "image. Try another position or layer."
        )
    field = unit.theory(first[:1], found)
    scores, peak = mean / mean.max(), float(mean.max())
    sigma_y, sigma_x = (_deviation(scores.sum(axis)) for axis in (1, 0))
    return ReceptiveField(
        name=name or type(model).__name__,
        about={
            **(about or {}),
            "images": count,
            "size": size[-1] if size[-2] == size[-1] else _sides(size[-2:]),
            **({"frames": size[1]} if len(size) == 4 else {}),
            **unit.about(found),
        },
        scores=scores,
        peak=peak,
        area_ratio=_area_ratios(scores, field.center),
        log_area_ratio=_area_ratios(_logarithmic(scores, peak), field.center),
        sigma_x=sigma_x,
        sigma_y=sigma_y,
        theoretical=field,
        clipped=field.clipped(size[-2:]),
        layer=unit.layer,
        position=found.unit,
        of=unit.of(),
        box=unit.box,
    )


def _of_one_size(parts: Iterable[Tensor], size: tuple[int, ...]) -> Iterator[Tensor]:
    for part in parts:
        if tuple(part.shape[1:]) != size:
            raise ValueError(f"images must be of one size; got {size} and {tuple(part.shape[1:])}.")
        yield part


def _contributions(gradients: Iterable[Tensor], where: str) -> tuple[np.ndarray, int]:
    """Return the positive gradients, summed over channels and averaged over images, (H, W), and the image count."""
    total: Tensor | None = None
    count = 0
    for gradient in gradients:
        if not gradient.isfinite().all():
            raise ValueError(
                f"the gradient of {where} is not finite for an image from {count} to {count + len(gradient) - 1}: "
                "activations overflow, or weights are not finite."
            )
        part = gradient.clamp(min=0).flatten(0, -3).sum(0, dtype=torch.float64).cpu()
        total = part if total is None else total + part
        count += len(gradient)
    mean: np.ndarray = (torch.zeros(()) if total is None else total).numpy() / count
    return mean, count


def _logarithmic(scores: np.ndarray, peak: float) -> np.ndarray:
    logarithms: np.ndarray = np.log1p(peak * scores) / np.log1p(peak)  # the base cancels out
    return logarithms


def _area_ratios(scores: np.ndarray, center: tuple[float, float]) -> dict[float, float]:
    """Return for each threshold the area of the smallest square around ``center`` that holds that share of the scores.

    Squares have whole pixels, are up to half a pixel off center, and end at the image's border.
    """
    twice = [abs(2 * np.arange(side) - round(2 * middle)) for side, middle in zip(scores.shape, center, strict=True)]
    distance = np.maximum(twice[0][:, None], twice[1][None]).ravel()
    held = np.bincount(distance, weights=scores.ravel()).cumsum()
    area = np.bincount(distance).cumsum()
    # The tolerance keeps rounding of the sums from missing a share that is reached exactly.
    reached = np.searchsorted(held, np.array(THRESHOLDS) * held[-1] * (1 - 1e-9))
    return {share: float(area[k]) / scores.size for share, k in zip(THRESHOLDS, reached, strict=True)}


def _deviation(profile: np.ndarray) -> float:
    places, weights = np.arange(len(profile)), profile / profile.sum()
    mean = (places * weights).sum()
    return float(np.sqrt(((places - mean) ** 2 * weights).sum()))


def _sides(shape: Sequence[int]) -> str:
    return str(shape[0]) if shape[0] == shape[1] else f"{shape[0]}x{shape[1]}"


def _extent(field: Field, whole: str) -> str:
    """Return the sides of a theoretical field as text, ``whole`` if it is the image."""
    if field.size is not None:
        return _sides(field.size)
    return whole if field.computed else "not computed"


_Entry = tuple[str, ReceptiveField]


def _table(results: Mapping[str, ReceptiveField]) -> list[list[_Entry | None]]:
    """Arrange results in rows of panels, each with its heading: sizes by names, or in the given order."""
    names = list(dict.fromkeys(result.name for result in results.values()))
    sizes = list(dict.fromkeys(result.size for result in results.values()))
    places = {(result.name, result.size): result for result in results.values()}
    if len(sizes) > 1 and len(places) == len(results) and 1 < len(names) <= _WIDEST:
        return [[_entry(places, name, size) for name in names] for size in sizes]
    if 1 < len(sizes) <= _WIDEST and len(places) == len(results):
        return [[_entry(places, name, size) for size in sizes] for name in names]
    entries: list[_Entry | None] = list(results.items())
    columns = min(len(entries), _WIDEST - 1)
    entries += [None] * (-len(entries) % columns)
    return [entries[i : i + columns] for i in range(0, len(entries), columns)]


def _entry(places: Mapping[tuple[str, str], ReceptiveField], name: str, size: str) -> _Entry | None:
    return (f"{name}\n{size} px", places[name, size]) if (name, size) in places else None


def _wrapped(heading: str, letters: int) -> str:
    """Break lines after spaces and underscores."""
    lines = (textwrap.fill(line.replace("_", "_ "), letters) for line in heading.splitlines())
    return "\n".join(lines).replace("_ ", "_")


def _draw_one(axis: Axes, heading: str, result: ReceptiveField, *, log: bool) -> AxesImage:
    (H, W), (y, x) = result.scores.shape, result.theoretical.center
    scores = np.maximum(result.scores, _FAINTEST) if log else result.scores
    limits: dict[str, Any] = {"norm": "log", "vmin": _FAINTEST} if log else {"vmin": 0}
    shown = axis.imshow(scores, extent=(-0.5 - x, W - 0.5 - x, H - 0.5 - y, -0.5 - y), cmap="magma_r", vmax=1, **limits)
    size = result.theoretical.size
    if size is not None and size == result.clipped:
        from_top, from_left = (-side / 2 for side in size)
        corners = ((from_left, -from_left), (from_top, -from_top))
        (left, right), (top, bottom) = corners
        axis.plot([left, right, right, left, left], [top, top, bottom, bottom, top], "--", color=report.COLORS[0])
    if result.box is not None:
        left, top, right, bottom = result.box
        across, down = np.array([left, right, right, left, left]) - x, np.array([top, top, bottom, bottom, top]) - y
        axis.plot(across - 0.5, down - 0.5, color=report.COLORS[0], linewidth=1.2)
    axis.set_title(heading)
    axis.locator_params(nbins=3)
    shares = "/".join(f"{share:.0%}"[:-1] for share in result.area_ratio)
    ratios = " / ".join(_percent(ratio) for ratio in result.area_ratio.values())
    field = f"{_sides(size)} px" if size else _extent(result.theoretical, "whole image")
    of = f"{result.of}\n" if result.of else ""
    axis.set_xlabel(f"{of}{shares} % within\n{ratios} %\ntheoretical: {field}", fontsize=6.5)
    return shown


def _percent(ratio: float) -> str:
    """Format a share as a percentage with two digits."""
    return f"{100 * ratio:.0f}" if ratio >= 0.0995 else f"{100 * ratio:.2g}"
