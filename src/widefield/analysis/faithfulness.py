"""Test whether an activation map marks the pixels that a score depends on (Petsiuk et al. 2018, RISE, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from widefield import _checks, report
from widefield.analysis._model import track, visited
from widefield.analysis._result import Result
from widefield.analysis._scores import class_scores
from widefield.analysis.cam import ClassActivation, upsampled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KERNEL, _SIGMA = 11, 5.0
"""Of the blurred images to which pixels are added, as in RISE's code, for sides of 224 pixels."""


@dataclass(frozen=True)
class Faithfulness(Result):
    """What becomes of a class's probability if the pixels that a map ranks first are hidden, or shown alone."""

    name: str
    about: Mapping[str, Any]
    shares: np.ndarray
    """(S,), float64: shares of the image's pixels that are hidden or shown, from 0 to 1."""
    deletion: np.ndarray
    """(N, S), float64: the probability with that share hidden, first pixels first; hidden pixels have the images' mean.
    """
    insertion: np.ndarray
    """(N, S), float64: the probability with that share shown in a blurred image."""
    random_deletion: np.ndarray
    """(N, S), float64: as ``deletion``, for a random map of the same resolution: the score of a map that knows nothing.
    """
    random_insertion: np.ndarray
    """(N, S), float64: as ``insertion``, likewise."""

    title = "Faithfulness of activation maps"
    lead = (
        "Left: pixels are hidden, those that the map ranks first at first; a map that marks what the class depends on "
        "lets its probability fall early. Right: pixels are shown in a blurred image; the probability should rise "
        "early. Dashed: random maps of the same resolution. Lines are means over images."
    )

    def areas(self) -> dict[str, np.ndarray]:
        """Return the mean probability over the shares, (N,), by name: the area under each image's curve."""
        names = ("deletion", "insertion", "random_deletion", "random_insertion")
        curves = {name: getattr(self, name) for name in names}
        widths = np.diff(self.shares)
        return {name: ((curve[:, 1:] + curve[:, :-1]) / 2 * widths).sum(1) for name, curve in curves.items()}

    def better(self) -> tuple[int, int]:
        """Return for how many images the map does better than a random one: with pixels hidden, and shown."""
        found = self.areas()
        hidden = found["deletion"] < found["random_deletion"]
        shown = found["insertion"] > found["random_insertion"]
        return int(hidden.sum()), int(shown.sum())

    def rows(self) -> list[dict[str, str]]:
        """Return one row: areas under the curves, and how often the map beats a random one."""
        found = self.areas()
        count = len(self.deletion)
        hidden, shown = self.better()
        return [
            {
                "model": self.name,
                "method": str(self.about.get("method", "")),
                "deletion (lower is better)": f"{found['deletion'].mean():.3f}",
                "at random": f"{found['random_deletion'].mean():.3f}",
                "beats random": f"{hidden} of {count}",
                "insertion (higher is better)": f"{found['insertion'].mean():.3f}",
                "at random ": f"{found['random_insertion'].mean():.3f}",
                "beats random ": f"{shown} of {count}",
            }
        ]

    @classmethod
    def reading(cls, results: Mapping[str, Faithfulness]) -> str:
        """Return in how many images maps do better than random ones, when pixels are hidden and when they are shown."""
        parts = []
        for name, result in results.items():
            hidden, shown = result.better()
            parts.append(f"{name} in {hidden} of {len(result.deletion)} when hidden and in {shown} when shown")
        return f"Pixels that the map ranks first matter more than random ones: {'; '.join(parts)}."

    @classmethod
    @report.paper()
    def draw(cls, results: Mapping[str, Faithfulness]) -> Figure:
        """Draw the mean curves of all results."""
        figure = report.blank(report.PAGE, 2.4)
        for axis, name in zip(figure.subplots(1, 2, sharey=True), ("deletion", "insertion"), strict=True):
            for number, (label, result) in enumerate(results.items()):
                percent = 100 * result.shares
                color = report.COLORS[number % len(report.COLORS)]
                axis.plot(percent, getattr(result, name).mean(0), color=color, label=label)
                axis.plot(percent, getattr(result, f"random_{name}").mean(0), "--", color=color, linewidth=0.8)
            axis.set(xlabel=f"pixels {'hidden' if name == 'deletion' else 'shown'} (%)", xlim=(0, 100))
        figure.axes[0].set_ylabel("probability of the class")
        figure.axes[0].legend()
        return figure


@_checks.guided
def faithfulness(
    model: nn.Module,
    images: Tensor,
    activation: ClassActivation,
    *,
    steps: int = 16,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> Faithfulness:
    """Hide and show the pixels of images in the order of their activation maps (RISE's deletion and insertion).

    The maps are read at the images' size; pixels of equal value come in random order. Hidden pixels get the mean of the
    data, which is 0 in normalized images. Pixels are shown in an image blurred by a Gaussian, whose width grows with
    the image from RISE's 5 pixels at 224. The same is done with random maps of the layer's resolution, which is what a
    map that knows nothing would score. (Single pixels in random order would be no such measure: hidden, they are noise
    that takes the class's probability away faster than most maps do.) Hidden regions have edges of their own: compare
    maps of one model, not models.

    Args:
        model: that of the maps.
        images: normalized images (N, C, H, W) that the maps are of.
        activation: of :func:`class_activation`, of classes as a whole.
        steps: number of equal shares of pixels.
        batch_size: images at a time.
        seed: of the random maps, and of the order of equal pixels.
        progress: show a progress bar.

    Raises:
        ValueError: the images are not those of the maps in number or size; the maps explain a place and not a class;
            or a class was not detected.
    """
    steps = _checks.integer("steps", steps, minimum=2)
    _checks.integer("batch_size", batch_size)
    if images.ndim != 4 or (len(images), *images.shape[2:]) != (len(activation.maps), *activation.size):
        height, width = activation.size
        raise ValueError(
            f"images must be the {len(activation.maps)} images of the maps, (N, C, {height}, {width}); got "
            f"{tuple(images.shape)}."
        )
    if activation.where is not None or activation.boxes is not None or activation.points is not None:
        raise ValueError("faithfulness is measured of maps of a class as a whole, not of a pixel, box or key point.")
    if (activation.targets < 0).any():
        raise ValueError("some maps explain nothing, as nothing was detected: leave those images out, or give targets.")
    generator = torch.Generator().manual_seed(seed)
    targets = torch.from_numpy(activation.targets)
    ranked = _places(torch.from_numpy(activation.upsampled()).flatten(1), generator)
    noise = torch.rand(activation.maps.shape, generator=generator)
    unranked = _places(upsampled(noise, activation.size).flatten(1), generator)
    shares = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    blurred = _blurred(images)
    curves = []
    with visited(model), torch.no_grad():
        jobs = [(base, places) for places in (ranked, unranked) for base in ("deletion", "insertion")]
        for base, places in track(jobs, "faithfulness", total=len(jobs), show=progress):
            first, second = (images, torch.zeros_like(images)) if base == "deletion" else (blurred, images)
            curves.append(_curve(model, first, second, places, shares, targets, batch_size))
    return Faithfulness(
        activation.name, activation.about, shares.numpy(), *(curve.double().numpy() for curve in curves)
    )


def _places(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return the place of each pixel in the order of falling values, (N, P), as a share in [0, 1)."""
    count = values.shape[1]
    shuffled = torch.rand(values.shape, generator=generator).argsort(1)
    order = shuffled.gather(1, torch.argsort(values.gather(1, shuffled), dim=1, descending=True, stable=True))
    places = torch.empty(values.shape, dtype=torch.float64)
    return places.scatter_(1, order, (torch.arange(count, dtype=torch.float64) / count).expand(len(values), -1))


def _blurred(images: Tensor) -> Tensor:
    from torchvision.transforms.functional import gaussian_blur  # slow to import

    scale = max(images.shape[2:]) / 224
    kernel = min(2 * round((_KERNEL - 1) / 2 * scale) + 1, 2 * min(images.shape[2:]) - 1)
    blurred: Tensor = gaussian_blur(images, [max(kernel, 3)] * 2, [max(_SIGMA * scale, 0.5)] * 2)
    return blurred


def _curve(
    model: nn.Module, first: Tensor, second: Tensor, places: Tensor, shares: Tensor, targets: Tensor, batch_size: int
) -> Tensor:
    """Return the targets' probability, (N, S), of images whose first pixels, up to each share, are of another image."""
    columns = []
    masks = places.view(len(first), 1, *first.shape[2:])
    for share in shares.tolist():
        found = []
        for part in torch.arange(len(first)).split(batch_size):
            mixed = torch.where((masks[part] < share).to(first.device), second[part], first[part])
            scores = class_scores(model, mixed).upto(1 + int(targets[part].max()))
            found.append(scores.probability.cpu().gather(1, targets[part, None])[:, 0])
        columns.append(torch.cat(found))
    return torch.stack(columns, 1)
