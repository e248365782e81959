"""Measure Gaussian masks learned by GMConv layers: Chen et al., "GMConv", section IV-E and figure 7.

The size of a mask is given as its **extent** along each axis: the sum of its profile ``exp(-d^2 / (2 sigma^2))`` over
the taps of that axis, the side of an unmasked kernel with the same sum. It ranges from 1 (only the nearest tap is left;
2 for an even side) to the side itself (no effect). A width at half maximum would not describe most masks: at the start,
sigma 5, it is 12 taps for a 3x3 kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from widefield import _checks, report
from widefield._checks import Pair
from widefield.analysis import _stages
from widefield.analysis._model import chunks, running, track, visited, watched
from widefield.analysis._result import Result
from widefield.data.listing import counted
from widefield.nn import DynamicGMConv2d, GMConv2d
from widefield.nn.gmconv import gaussian_mask
from widefield.surgery.anatomy import anatomy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SAME = 0.01
"""Relative changes below this one are not counted as changes."""


@dataclass(frozen=True)
class LayerMask:
    """The mask of one layer.

    Attributes:
        name: of the module.
        stage: from 0; see :meth:`widefield.surgery.Anatomy.count_stages`.
        dynamic: whether the mask depends on the image.
        size: (rows, columns) of the kernel in taps.
        dilation: (rows, columns).
        start: sigma before training, in taps.
        sigma: (sigma_x, sigma_y) in taps, along a row and along a column; a static layer has one value for both. For a
            dynamic layer, the mean over the images.
        spread: standard deviations of sigma over the images; 0 for a static layer; None for a dynamic one without
            images.
        mask: (rows, columns), float64, 1 at the center; for a dynamic layer, the mean over the images.
        extent: (x, y) in taps, see this module; for a dynamic layer, the mean over the images.
    """

    name: str
    stage: int
    dynamic: bool
    size: Pair
    dilation: Pair
    start: float
    sigma: tuple[float, float]
    spread: tuple[float, float] | None
    mask: np.ndarray
    extent: tuple[float, float]

    @property
    def share(self) -> float:
        """Share of the kernel that the mask leaves: the mean of the mask over the taps, up to 1."""
        return float(self.mask.mean())

    @property
    def change(self) -> float:
        """By which factor training has changed ``share``: below 1, the mask has become narrower."""
        start = torch.tensor([self.start], dtype=torch.float64)
        return self.share / float(gaussian_mask(self.size, start, start).mean())

    @property
    def moves(self) -> bool:
        """Whether sigma differs between images by a hundredth or more."""
        spread = self.spread or (0.0, 0.0)
        return any(part >= _SAME * value for part, value in zip(spread, self.sigma, strict=True))


@dataclass(frozen=True)
class Masks(Result):
    """The masks of a model, in the order of the modules."""

    title: ClassVar[str] = "Gaussian masks"
    lead: ClassVar[str] = (
        "Above: masks of the kernels, mean over the layers of a stage. Below: sigma of every layer (filled: along x, "
        "open: along y where it differs; bars: standard deviation over images), its start as a dotted line, and the "
        "share of the kernel that the mask leaves: 1 is a kernel without a mask."
    )

    name: str
    about: Mapping[str, Any]
    layers: tuple[LayerMask, ...]

    def rows(self) -> list[dict[str, str]]:
        """Return one row for the masks of one kind and kernel size in a stage."""
        groups: dict[tuple[Any, ...], list[LayerMask]] = {}
        for layer in self.layers:
            groups.setdefault((layer.stage, layer.dynamic, layer.size), []).append(layer)
        return [
            {
                "model": self.name,
                "stage": str(stage + 1),
                "layers": f"{len(group)} {'dynamic' if dynamic else 'static'}",
                "kernel": f"{size[0]}x{size[1]}",
                "start": _range([layer.start for layer in group]),
                "sigma x": _range([layer.sigma[0] for layer in group]),
                "sigma y": _range([layer.sigma[1] for layer in group]),
                "extent x": _range([layer.extent[0] for layer in group]),
                "extent y": _range([layer.extent[1] for layer in group]),
                "kept": _range([layer.share for layer in group]),
            }
            for (stage, dynamic, size), group in groups.items()
        ]

    @classmethod
    def reading(cls, results: Mapping[str, Self]) -> str:
        """Return how much of the kernels the masks leave, what training changed, and whether images matter."""
        return " ".join(_read(name, result.layers) for name, result in results.items())

    @classmethod
    @report.paper()
    def draw(cls, results: Mapping[str, Self]) -> Figure:
        """Draw the mean mask of each stage; sigma and the share of the kernels that is left over depth."""
        side = max(max(_span(layer)) for r in results.values() for layer in r.layers)
        tiles = {name: _tiles(result.layers, side) for name, result in results.items()}
        above = _stages.height(tiles)
        figure: Any = report.blank(report.PAGE, above + 2.1)
        top, bottom = figure.subfigures(2, 1, height_ratios=[above, 2.1])
        _stages.draw(top, tiles, side, "mask")
        sigmas, shares = bottom.subplots(1, 2, width_ratios=[3, 2])
        for index, (name, result) in enumerate(results.items()):
            color = report.COLORS[index % len(report.COLORS)]
            style: dict[str, Any] = {"color": color, "marker": report.MARKERS[index % len(report.MARKERS)]}
            x = range(1, len(result.layers) + 1)
            sigmas.plot(x, [layer.start for layer in result.layers], color=color, linewidth=0.9, linestyle=":")
            _over_depth(sigmas, x, result.layers, style)
            shares.plot(x, [layer.share for layer in result.layers], label=_stages.short(name), **style)
        _finish(sigmas, shares, len(results) > 1)
        drawn: Figure = figure
        return drawn


@_checks.guided
def masks(
    model: nn.Module,
    images: Tensor | Iterable[Any] | None = None,
    *,
    batch_size: int = 8,
    name: str | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Masks:
    """Read the masks of a model's GMConv layers.

    A static layer (:class:`widefield.nn.GMConv2d`) has one mask. The mask of a dynamic layer
    (:class:`widefield.nn.DynamicGMConv2d`) depends on the image: with ``images``, mean and spread over them are
    returned; without, the mask of an image that activates no hidden unit of the predictor, which is also the mask
    before training.

    Args:
        model: with GMConv layers, on any device, in any mode; left unchanged.
        images: normalized images (N, C, H, W), or batches of them; used only for dynamic layers.
        batch_size: images at a time.
        name: the model's name in tables and figures. Default: its class name.
        about: facts to store with the result.
        progress: show a progress bar.

    Returns:
        The masks, in the order of the modules.

    Raises:
        ValueError: no layer has a mask; there are no images; a dynamic layer is not called.
        TypeError: images have the wrong type.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (GMConv2d, DynamicGMConv2d))}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer with a mask: convert it with widefield.GMConv, and train it. After "
            "reparameterization, masks are part of the weights of plain convolutions: read them before."
        )
    _checks.integer("batch_size", batch_size)
    dynamic = {n: layer for n, layer in layers.items() if isinstance(layer, DynamicGMConv2d)}
    seen = _over_images(model, dynamic, images, batch_size, progress) if dynamic and images is not None else {}
    stages = anatomy(model).count_stages(list(layers))
    found = []
    for key, layer in layers.items():
        sigmas = seen[key] if key in seen else _of_no_image(layer)
        found.append(_layer(key, layer, stages[key], sigmas, key in seen))
    facts = dict(about or {})
    if dynamic:
        facts["dynamic masks"] = f"mean over {len(next(iter(seen.values())))} images" if seen else "of no image"
    return Masks(name or type(model).__name__, facts, tuple(found))


@torch.no_grad()
def _of_no_image(layer: GMConv2d | DynamicGMConv2d) -> Tensor:
    """Return the sigmas (1, 2), along x and y, that the layer uses without an image; float64, on the CPU."""
    if isinstance(layer, DynamicGMConv2d):
        sigmas = layer._sigmas(layer.predictor.out.bias)
    else:
        sigmas = layer._read(layer.sigma).expand(2)
    return sigmas.to("cpu", torch.float64)[None]


def _over_images(
    model: nn.Module, layers: Mapping[str, DynamicGMConv2d], images: Any, batch_size: int, progress: bool
) -> dict[str, Tensor]:
    """Return the sigmas (N, 2) that each layer uses for each image."""
    found: dict[str, list[Tensor]] = {key: [] for key in layers}

    def see(key: str, predictor: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found[key].append(layers[key]._sigmas(output).to("cpu", torch.float64))

    with visited(model), torch.no_grad(), watched({key: layer.predictor for key, layer in layers.items()}, see):
        for part in track(chunks(images, model, batch_size), "masks", show=progress):
            with running(model, part):
                model(part)
    silent = [key for key, sigmas in found.items() if not sigmas]
    if silent:
        raise ValueError(f"{', '.join(silent)} saw no image: the model does not call it.")
    return {key: torch.cat(sigmas) for key, sigmas in found.items()}


def _layer(name: str, layer: GMConv2d | DynamicGMConv2d, stage: int, sigmas: Tensor, over_images: bool) -> LayerMask:
    """Return the statistics of a layer, given its sigmas (N, 2)."""
    rows, columns = layer.kernel_size
    total, extent = torch.zeros(rows, columns, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for part in sigmas.split(256):
        masks = gaussian_mask(layer.kernel_size, *part.unbind(-1))
        total += masks.sum(0)
        extent += torch.stack((masks.amax(1).sum(), masks.amax(2).sum()))  # the profile of the nearest row
    across, down = (extent / len(sigmas)).tolist()
    x, y = sigmas.mean(0).tolist()
    spread = tuple(sigmas.std(0, correction=0).tolist()) if over_images else (0.0, 0.0)
    dynamic = isinstance(layer, DynamicGMConv2d)
    return LayerMask(
        name,
        stage,
        dynamic,
        layer.kernel_size,
        layer.dilation,
        layer.start,
        (x, y),
        None if dynamic and not over_images else (spread[0], spread[1]),
        (total / len(sigmas)).numpy(),
        (across, down),
    )


# Texts and lines


def _read(name: str, layers: Sequence[LayerMask]) -> str:
    """Return what the masks of a model show."""
    tightest, widest = (chosen(layers, key=lambda layer: layer.share) for chosen in (min, max))
    least, most = f"{tightest.share:.0%}", f"{widest.share:.0%}"
    if len(layers) == 1:
        words = f"{name}: the mask of {tightest.name or 'the layer'} leaves {least} of the kernel."
    elif least == most:
        words = f"{name}: each of the {len(layers)} masks leaves {least} of its kernel."
    else:
        words = (
            f"{name}: {len(layers)} masks leave {least} ({tightest.name}) to {most} ({widest.name}) of their kernels."
        )
    words += f" {_since_the_start(layers)}"
    dynamic = [layer for layer in layers if layer.dynamic]
    one = len(dynamic) == 1
    number = counted(len(dynamic), "dynamic mask")
    if any(layer.spread is None for layer in dynamic):
        words += f" Without images, nothing is known of how {number} {'changes' if one else 'change'} with them."
    elif dynamic:
        moving = sum(layer.moves for layer in dynamic)
        words += f" {moving} of {number} {'differs' if one else 'differ'} between images by 1 % or more."
    return words


def _since_the_start(layers: Sequence[LayerMask]) -> str:
    narrower = sum(layer.change < 1 - _SAME for layer in layers)
    wider = sum(layer.change > 1 + _SAME for layer in layers)
    if len(layers) == 1:
        now = "narrower than" if narrower else "wider than" if wider else "as wide as"
        return f"It is {now} at the start of training."
    if narrower or wider:
        return f"Since the start of training {narrower} became narrower and {wider} wider."
    return "All are as wide as at the start of training."


def _range(values: Sequence[float]) -> str:
    least, most = f"{min(values):.3g}", f"{max(values):.3g}"
    return least if least == most else f"{least} to {most}"


def _span(layer: LayerMask) -> Pair:
    return _stages.span(layer.size, layer.dilation)


def _tiles(layers: Sequence[LayerMask], side: int) -> list[tuple[str, np.ndarray]]:
    return _stages.tiles([(x.stage, x.mask, x.dilation) for x in layers], side)


def _over_depth(axis: Any, x: Sequence[int], layers: Sequence[LayerMask], style: Any) -> None:
    axis.plot(x, [layer.sigma[0] for layer in layers], **style)
    for place, layer in zip(x, layers, strict=True):
        if layer.spread and max(layer.spread):
            for sigma, deviation in zip(layer.sigma, layer.spread, strict=True):
                axis.errorbar(place, sigma, deviation, color=style["color"], linewidth=0.8, capsize=2, zorder=1.5)
    unequal = [(i, layer.sigma[1]) for i, layer in zip(x, layers, strict=True) if layer.sigma[0] != layer.sigma[1]]
    if unequal:
        axis.plot(*zip(*unequal, strict=True), linestyle="none", markerfacecolor="white", **style)


def _finish(sigmas: Any, shares: Any, several: bool) -> None:
    sigmas.set_ylabel("sigma (taps)")
    shares.set_ylabel("share of the kernel kept")
    shares.set_ylim(0, 1.05)
    sigmas.margins(y=0.15)
    sigmas.set_ylim(bottom=0)
    for axis in (sigmas, shares):
        axis.set_xlabel("layer")
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    if several:
        shares.legend(loc="best")
