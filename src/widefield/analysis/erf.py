"""What a unit does see: effective receptive fields (Ding et al. 2022, section 5, figure 1 and appendix B)."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from widefield import _checks, report
from widefield.analysis._model import Layer, chunks, is_size, layer_name, made_up, track, visited
from widefield.analysis._result import Result
from widefield.analysis.theoretical import (
    Field,
    Target,
    candidates,
    feature_map,
    theoretical_receptive_field,
    unit,
    unknown,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
"""Shares of all contributions whose area is reported: those of the paper's table."""

OUTPUT = "(output)"
"""What tables call the layer "", which is the model itself."""

_FAINTEST = 1e-4
"""Where the logarithmic colours end."""

_NOISES = 8
"""Images that are made up where a size is given."""

_WIDEST = 5
"""Panels beside each other that can be read on a page."""


@dataclass(frozen=True)
class ReceptiveField(Result):
    """The effective receptive field of one unit, over some images.

    Attributes:
        scores: (H, W), float64: how much each pixel contributes to the unit, rescaled to a maximum of 1.
        peak: what that maximum was, per image: ``peak * scores`` are the paper's sums of gradients.
        area_ratio: for a share of all contributions, the share of the image's area that the smallest square needs
            which is centred on the theoretical field and holds that share. The gradients' magnitude does not matter.
        log_area_ratio: the same of ``log10(peak * scores + 1)``, as in the paper's table. Here it does matter: the
            larger the gradients, the flatter their logarithm and the larger its area.
        sigma_x, sigma_y: standard deviations, in pixels, of the Gaussian that fits the scores with maximum likelihood,
            which is the one with their second moments. Long tails count; the image's border cuts them off.
        theoretical: what the same unit can see.
        clipped: how many (rows, columns) of that lie in the image.
        layer: whose map it is.
        target: (row, column) of the unit in the map.
    """

    title: ClassVar[str] = "Effective receptive fields"
    lead: ClassVar[str] = (
        "How much every pixel contributes to one unit of a feature map: the positive part of the gradient, summed over "
        "channels and images, relative to the largest. Under each field: the share of the image's area that the "
        "smallest centred square needs to hold 20, 30, 50 and 99 % of all contributions, and the theoretical receptive "
        "field, dashed where it fits into the image."
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
    target: tuple[int, int]

    @property
    def size(self) -> str:
        """The images' size in words: "224", or "224x320" (rows, columns)."""
        return _sides(self.scores.shape)

    def logarithmic(self) -> np.ndarray:
        """Return ``log10(A + 1)``, A the sums of an image's gradients, rescaled to a maximum of 1: figure 1."""
        return _logarithmic(self.scores, self.peak)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, strings, lists and mappings; scores to six decimals."""
        return {**super().to_dict(), "scores": np.round(self.scores, 6).tolist()}

    def rows(self) -> list[dict[str, str]]:
        """Return one row: the area ratios, the Gaussian's sigmas and the theoretical field."""
        ratios = {f"{share:.0%} in": f"{ratio:.1%}" for share, ratio in self.area_ratio.items()}
        return [
            {
                "model": self.name,
                "layer": self.layer or OUTPUT,
                "size, px": self.size,
                "images": str(self.about["images"]),
                **ratios,
                "sigma x/y, px": f"{self.sigma_x:.1f}/{self.sigma_y:.1f}",
                "theory, px": _sides(self.theoretical.size) if self.theoretical.size else "whole",
            }
        ]

    @classmethod
    @report.paper()
    def draw(cls, results: Mapping[str, ReceptiveField], *, log: bool = True) -> Figure:
        """Draw fields with one scale of colours; those of models at several sizes as a table.

        Args:
            results: by what to call them in a figure without a table; in a table their own names and sizes count.
            log: colour the scores by their logarithm, down to 1e-4 of the maximum, and not by themselves. (The paper
                colours log10(A + 1), which depends on the magnitude of gradients: :meth:`logarithmic`.)
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
        for places in axes:  # rows are counted once where all have the same
            if len({axis.get_ylim() for axis in places if axis.images}) == 1:
                for axis in places[1:]:
                    axis.tick_params(labelleft=False)
        if shown is not None:
            bar = figure.colorbar(shown, ax=axes, aspect=25 * len(table), pad=0.01, extend="min" if log else "neither")
            bar.set_label("contribution, relative to the largest")
            bar.outline.set_visible(False)
        figure.supxlabel("pixels from the centre of the theoretical field", fontsize=8)
        return figure


def effective_receptive_field(
    model: nn.Module,
    images: Tensor | Iterable[Any] | int | Sequence[int],
    layer: Layer | None = None,
    target: Target = "center",
    *,
    batch: int = 8,
    name: str | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> ReceptiveField:
    """Measure how much each pixel contributes to a unit of a layer's map: RepLKNet, section 5 and appendix B.

    The unit's channels are added up and differentiated with respect to each image. Of the gradient, what is negative is
    dropped, and the rest added up over channels and images. (The authors' script drops negative outputs, too, before it
    adds up the channels; the paper does not, and neither does this.)

    The squares of the area ratios are centred on the theoretical field, or on the unit's share of the image where
    that is not known. Neither is the middle of the image for maps with even sides or layers with uneven padding: unit
    3 of 7 of a ResNet looks at pixel 96 of 224.

    Weights matter: where residual branches start at nothing (the last norm of timm's ResNets, the layer scale of
    ConvNeXt), an untrained network sees what its shortcuts see.

    Args:
        model: any whose layer's output keeps the images' proportions: (N, C, h, w), (N, h, w, C), or tokens (N, L, C).
        images: (N, C, H, W), normalised, or batches of them, all of one size. Or a size, the side or (rows, columns):
            then eight images of normal noise, always the same, with as many channels as the model's first convolution
            takes. Video clips (N, C, T, H, W) are taken as well: what a place of a map shows at its time steps is added
            up, and so is what the frames contribute to it.
        layer: a module, or its name. None: the last in the backbone that gives a map
            (:func:`widefield.surgery.anatomy.anatomy`), as a detector's heads look at no place of the image; but
            not one whose channels always add up to the same, as they do after a layer norm with the weights that it
            starts with: then the last before.
        target: "center", which is the unit (h // 2, w // 2) of the map, or (row, column) from 0.
        batch: images at a time.
        name: what to call the model; None: its class.
        about: further facts for the result to keep.
        progress: show a bar.

    Raises:
        ValueError: no images, images of several sizes or of one that the model refuses; a layer that is unknown, gives
            no map, or has no gradient, none that is finite, or none that is positive; a target outside of the map.
        TypeError: images, a layer or a target of another kind.
    """
    _checks.integer("batch", batch)
    named = None if layer is None else layer_name(model, layer)
    if isinstance(images, int) or is_size(images):
        images = made_up(model, images, _NOISES, noise=True)
        about = {"source": "noise", **(about or {})}
    parts = chunks(images, model, batch, clips=True)
    first = next(parts)
    size = tuple(first.shape[1:])
    total = torch.zeros(size[-2:], dtype=torch.float64)
    count = 0
    with visited(model):
        names = candidates(model, first[:1].clone())[::-1] if named is None else [named]
        found, chosen = _first(model, first, names, target)
        for part in track(chain([first], parts), "effective receptive field", show=progress):
            if tuple(part.shape[1:]) != size:
                raise ValueError(f"images must be of one size; got {size} and {tuple(part.shape[1:])}.")
            gradient = found.gradient if part is first else _look(model, part, chosen, target).gradient
            if not gradient.isfinite().all():
                raise ValueError(
                    f"the gradient of layer {chosen!r} of {type(model).__name__} is not finite for an image from "
                    f"{count} to {count + len(part) - 1}: activations overflow, or weights are not finite."
                )
            total += gradient.clamp(min=0).flatten(0, -3).sum(0, dtype=torch.float64).cpu()
            count += len(part)
    if not total.any():
        raise ValueError(
            f"no pixel has a positive gradient in layer {chosen!r} of {type(model).__name__}: the unit {found.unit} is "
            "dead or sees nothing of the image. Try another target or layer."
        )
    try:
        field = theoretical_receptive_field(model, first[:1], chosen, target)
    except (RuntimeError, ValueError) as error:  # compiled or scripted in a way that shows no operators
        reason = f"its operators cannot be followed: {str(error.__cause__ or error).splitlines()[0]}"
        field = unknown(first, found.places, found.unit, reason)
    mean = total.numpy() / count
    scores, peak = mean / mean.max(), float(mean.max())
    sigma_y, sigma_x = (_deviation(scores.sum(axis)) for axis in (1, 0))
    return ReceptiveField(
        name or type(model).__name__,
        {
            **(about or {}),
            "images": count,
            "size": size[-1] if size[-2] == size[-1] else _sides(size[-2:]),
            **({"frames": size[1]} if len(size) == 4 else {}),
            "layer": chosen or OUTPUT,
            "unit": f"{found.unit} of {_sides(found.places)}",
        },
        scores,
        peak,
        _area_ratios(scores, field.centre),
        _area_ratios(_logarithmic(scores, peak), field.centre),
        sigma_x,
        sigma_y,
        field,
        field.clipped(size[-2:]),
        chosen,
        found.unit,
    )


class _Look(NamedTuple):
    gradient: Tensor
    """(N, C, H, W), or (N, C, T, H, W): of the sum of the unit's channels, with respect to the images."""
    cancels: bool
    """Whether the channels' gradients add up to nothing."""
    unit: tuple[int, int]
    places: tuple[int, int]
    """Sides of the map."""


def _first(model: nn.Module, images: Tensor, names: Sequence[str], target: Target) -> tuple[_Look, str]:
    """Look at the first images through the first of these layers whose sum has a gradient; return its name, too."""
    for name in names:
        found = _look(model, images, name, target, check=True)
        if not found.cancels:
            return found, name
    raise ValueError(
        f"the channels of layer {names[0]!r} of {type(model).__name__} always add up to the same, as after a layer "
        "norm with the weights that it starts with: their sum has no gradient. Give the layer before it."
    )


def _look(model: nn.Module, images: Tensor, layer: str, target: Target, *, check: bool = False) -> _Look:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.detach().clone().requires_grad_()
        found = feature_map(model, layer, leaf.clone())  # a copy: models may write on their input
        row, column = unit(target, found, layer)
        channels = found[:, :, row, column]
        gradient = _gradient(channels.sum(), leaf, check)
        cancels = False
        if gradient is not None and check and channels.shape[1] > 1:
            signs = torch.ones(channels.shape[1])
            signs[torch.randperm(len(signs), generator=torch.Generator().manual_seed(0))[::2]] = -1
            other = _gradient((channels * signs.to(channels)).sum(), leaf, False)
            noise = min(0.1, 1000 * torch.finfo(images.dtype).eps)
            cancels = other is not None and bool(gradient.norm() <= noise * other.norm()) and bool(other.any())
    if gradient is None:
        raise ValueError(
            f"layer {layer!r} of {type(model).__name__} has no gradient with respect to the images: it does not depend "
            "on them, or is computed without gradients (torch.no_grad, detach)."
        )
    return _Look(gradient, cancels, (row, column), (found.shape[2], found.shape[3]))


def _gradient(value: Tensor, leaf: Tensor, keep: bool) -> Tensor | None:
    if not value.requires_grad:
        return None
    found: Tensor | None = torch.autograd.grad(value, leaf, retain_graph=keep, allow_unused=True)[0]
    return found


def _logarithmic(scores: np.ndarray, peak: float) -> np.ndarray:
    logarithms: np.ndarray = np.log1p(peak * scores) / np.log1p(peak)  # of any base: it is rescaled
    return logarithms


def _area_ratios(scores: np.ndarray, centre: tuple[float, float]) -> dict[float, float]:
    """Return for each threshold the area of the smallest square around ``centre`` that holds that share of scores.

    Squares have whole pixels, up to half a pixel off centre, and end at the image's border.
    """
    twice = [abs(2 * np.arange(side) - round(2 * middle)) for side, middle in zip(scores.shape, centre, strict=True)]
    distance = np.maximum(twice[0][:, None], twice[1][None]).ravel()
    held = np.bincount(distance, weights=scores.ravel()).cumsum()
    area = np.bincount(distance).cumsum()
    # A share that is reached exactly is reached, whatever the order of a sum rounds it to.
    reached = np.searchsorted(held, np.array(THRESHOLDS) * held[-1] * (1 - 1e-9))
    return {share: float(area[k]) / scores.size for share, k in zip(THRESHOLDS, reached, strict=True)}


def _deviation(profile: np.ndarray) -> float:
    places, weights = np.arange(len(profile)), profile / profile.sum()
    mean = (places * weights).sum()
    return float(np.sqrt(((places - mean) ** 2 * weights).sum()))


def _sides(shape: Sequence[int]) -> str:
    return str(shape[0]) if shape[0] == shape[1] else f"{shape[0]}x{shape[1]}"


_Entry = tuple[str, ReceptiveField]


def _table(results: Mapping[str, ReceptiveField]) -> list[list[_Entry | None]]:
    """Lay results out in rows of panels, each with its heading: sizes x names, or in the order in which they come."""
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
    """Break lines behind spaces and underscores, of which names are full."""
    lines = (textwrap.fill(line.replace("_", "_ "), letters) for line in heading.splitlines())
    return "\n".join(lines).replace("_ ", "_")


def _draw_one(axis: Axes, heading: str, result: ReceptiveField, *, log: bool) -> AxesImage:
    (H, W), (y, x) = result.scores.shape, result.theoretical.centre
    scores = np.maximum(result.scores, _FAINTEST) if log else result.scores
    limits: dict[str, Any] = {"norm": "log", "vmin": _FAINTEST} if log else {"vmin": 0}
    shown = axis.imshow(scores, extent=(-0.5 - x, W - 0.5 - x, H - 0.5 - y, -0.5 - y), cmap="magma_r", vmax=1, **limits)
    size = result.theoretical.size
    if size is not None and size == result.clipped:
        from_top, from_left = (-side / 2 for side in size)
        corners = ((from_left, -from_left), (from_top, -from_top))
        (left, right), (top, bottom) = corners
        axis.plot([left, right, right, left, left], [top, top, bottom, bottom, top], "--", color=report.COLOURS[0])
    axis.set_title(heading)
    axis.locator_params(nbins=3)
    shares = "/".join(f"{share:.0%}"[:-1] for share in result.area_ratio)
    ratios = " / ".join(_percent(ratio) for ratio in result.area_ratio.values())
    field = f"{_sides(size)} px" if size else "whole image"
    axis.set_xlabel(f"{shares} % within\n{ratios} %\ntheoretical: {field}", fontsize=6.5)
    return shown


def _percent(ratio: float) -> str:
    """Return two digits of a percentage."""
    return f"{100 * ratio:.0f}" if ratio >= 0.0995 else f"{100 * ratio:.2g}"
