"""Shape or texture: which of two cues in conflict a classifier goes by.

The measure is that of Geirhos, Rubisch, Michaelis, Bethge, Wichmann and Brendel, "ImageNet-trained CNNs are biased
towards texture; increasing shape bias improves accuracy and robustness" (ICLR 2019), with their images: of the
decisions that are right by either cue, the share that is right by shape. RepLKNet (Ding et al. 2022, appendix C)
reports it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from widefield import report
from widefield.analysis._model import track, visited
from widefield.analysis._result import Result
from widefield.analysis._scores import logits
from widefield.data.conflict import SIXTEEN, ConflictImages
from widefield.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from widefield.surgery.outputs import place

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Z = 1.959964  # the normal distribution's quantile for an interval of 95 %


@dataclass(frozen=True)
class ShapeBias(Result):
    """Decisions of a classifier on images whose shape and texture name different classes.

    Arrays are int64, (K,) for K classes: images are counted under the class of their shape.
    """

    title: ClassVar[str] = "Shape bias"
    lead: ClassVar[str] = (
        "Of the decisions that name either the shape's or the texture's class, the share that names the shape's. "
        "A mark is the images with a shape of that class; a line is all images, its band the 95 % interval."
    )

    name: str
    about: Mapping[str, Any]
    classes: tuple[str, ...]
    images: np.ndarray
    """Images in conflict."""
    shape: np.ndarray
    """Decisions for the class of the shape."""
    texture: np.ndarray
    """Decisions for the class of the texture."""
    bias: float
    """Shape decisions over shape and texture decisions, from 0 to 1; not a number if there is neither."""
    interval: tuple[float, float]
    """Of ``bias``: Wilson's, at 95 %, as if images were independent. Published ones share shapes and textures."""
    cue_accuracy: float
    """Share of the images in conflict that were given the class of either cue."""
    left_out: int
    """Images without a conflict, which are not counted."""

    def shares(self) -> np.ndarray:
        """Return ``bias`` for each class of shape, float64 (K,); not a number without a right decision."""
        decided = self.shape + self.texture
        shares: np.ndarray = np.divide(self.shape, decided, out=np.full(len(decided), np.nan), where=decided > 0)
        return shares

    def rows(self) -> list[dict[str, str]]:
        """Return one row for all images, and one a class of shape."""
        groups = [("all", slice(None)), *((name, slice(k, k + 1)) for k, name in enumerate(self.classes))]
        return [self._row(name, group) for name, group in groups if self.images[group].sum()]

    def _row(self, name: str, group: slice) -> dict[str, str]:
        images, shape, texture = (int(counts[group].sum()) for counts in (self.images, self.shape, self.texture))
        bias, (low, high) = _share(shape, shape + texture)
        return {
            "model": self.name,
            "class": name,
            "images": str(images),
            "shape": str(shape),
            "texture": str(texture),
            "either": f"{(shape + texture) / images:.0%}",
            "bias (95 %)": "-" if math.isnan(bias) else f"{bias:.1%} ({100 * low:.0f}–{100 * high:.0f})",
        }

    @classmethod
    @report.paper()
    def draw(cls, results: Mapping[str, ShapeBias], **options: Any) -> Figure:
        """Draw the share of shape decisions by class, a mark a model, and by model, a line; takes no options."""
        if options:
            raise TypeError(f"the figure of shape bias takes no options; got {sorted(options)}.")
        classes = sorted({c for r in results.values() for c, n in zip(r.classes, r.images, strict=True) if n})
        labels = [textwrap.fill(f"{name}: {_percent(result.bias)}", 50) for name, result in results.items()]
        lines = sum(label.count("\n") + 1 for label in labels)
        figure = report.blank(report.COLUMN, 0.85 + 0.15 * len(classes) + 0.14 * lines)
        axis = figure.subplots()
        for k, (label, result) in enumerate(zip(labels, results.values(), strict=True)):
            colour, marker = report.COLOURS[k % len(report.COLOURS)], report.MARKERS[k % len(report.MARKERS)]
            aside = 0.44 * (k - (len(results) - 1) / 2) / len(results)  # marks of equal shares stay apart
            places = [aside + classes.index(name) for name, n in zip(result.classes, result.images, strict=True) if n]
            axis.axvspan(*result.interval, color=colour, alpha=0.15, linewidth=0)
            axis.axvline(result.bias, color=colour, linewidth=1)
            axis.plot(
                result.shares()[result.images > 0], places, marker, color=colour, alpha=0.85, clip_on=False, label=label
            )
        axis.set_xlim(0, 1)
        axis.set_ylim(len(classes) - 0.5, -0.5)
        axis.set_yticks(range(len(classes)), classes)
        axis.tick_params(axis="y", length=0)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color="0.9", linewidth=0.6)
        axis.set_xlabel("← texture      share of shape decisions      shape →")
        axis.set_ylabel("class of the shape")
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center")
        return figure


def shape_bias(
    model: nn.Module,
    folder: str | Path,
    *,
    size: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    about: Mapping[str, Any] | None = None,
    batch: int = 8,
    progress: bool = False,
) -> ShapeBias:
    """Measure whether a classifier goes by shape or by texture, on images where the two name different classes.

    A model of ImageNet's 1,000 classes has to choose among the sixteen of the published images: the one whose own
    classes have the largest mean probability, as the authors recommend in the README of
    github.com/rgeirhos/texture-vs-shape. Another model chooses among all its ``classes``. Images whose cues agree are
    left out.

    Args:
        model: images (N, 3, size, size) to logits (N, outputs).
        folder: holds a folder a class of shape, with files ``SHAPEi-TEXTUREj.png``: the published images, or those of
            ``widefield.data.write_conflicts``.
        size: side of the images in pixels, to which others are resized.
        mean, std: of each channel for pixels in [0, 1], as the model expects them.
        classes: names of the model's outputs; None: ImageNet's 1,000.
        name: what to call the model; its class by default.
        about: facts to keep with the result.
        batch: images a forward pass.
        progress: show a bar on the terminal.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        OSError: an image that cannot be read.
        ValueError, TypeError: file names that do not fit, images without a conflict only, a model that gives no logits,
            classes that do not fit its outputs or the images, or an argument out of range.
    """
    images = ConflictImages(folder, size=size, mean=mean, std=std, batch=batch)
    choices = SIXTEEN if classes is None else {str(word): (k,) for k, word in enumerate(classes)}
    for label in images.classes:
        if label not in choices:
            raise ValueError(
                f"the images show a class {label!r}, which is none of {_listed(choices)}: "
                f"pass the names of the model's outputs as classes."
            )
    if classes is not None and len(choices) != len(classes):
        raise ValueError(f"classes must name every output once; got {_listed(classes)}.")
    outputs = 1000 if classes is None else len(classes)
    # Choice of the model -> class of the images, or -1 where the images have no such class.
    meaning = torch.tensor([images.classes.index(c) if c in images.classes else -1 for c in choices])
    counts = torch.zeros(3, len(images.classes), dtype=torch.int64)
    device, dtype = place(model)
    steps = -(-len(images) // images.batch)
    with visited(model), torch.no_grad():
        for sample in track(images, "shape bias", total=steps, show=progress):
            conflict = sample["shape"] != sample["texture"]
            if not conflict.any():
                continue
            shape, texture = sample["shape"][conflict], sample["texture"][conflict]
            scores = logits(model, sample["image"][conflict].to(device, dtype))
            if scores.shape[1] != outputs:
                raise ValueError(
                    f"{type(model).__name__} has {scores.shape[1]} outputs, "
                    + (
                        "not ImageNet's 1,000: pass their names"
                        if classes is None
                        else f"and {outputs} names were given"
                    )
                    + " as classes."
                )
            decisions = meaning[_choice(scores.cpu(), list(choices.values()))]
            for row, hit in zip(counts, (decisions > -2, decisions == shape, decisions == texture), strict=True):
                row += torch.bincount(shape[hit], minlength=len(row))
    seen, by_shape, by_texture = counts.sum(1).tolist()
    if not seen:
        raise ValueError(f"no image in {str(folder)!r} has a shape and a texture of different classes.")
    bias, interval = _share(by_shape, by_shape + by_texture)
    total, hits, misled = counts.numpy()
    return ShapeBias(
        name=type(model).__name__ if name is None else name,
        about={
            **(about or {}),
            "images": seen,
            "source": str(folder),
            "size": images.size,
            "mean": [round(value, 4) for value in images.mean],
            "std": [round(value, 4) for value in images.std],
            "choice": f"of {len(choices)} classes" + (", by mean probability" if classes is None else ""),
        },
        classes=images.classes,
        images=total,
        shape=hits,
        texture=misled,
        bias=bias,
        interval=interval,
        cue_accuracy=(by_shape + by_texture) / seen,
        left_out=len(images) - seen,
    )


def _choice(scores: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Return the group of outputs with the largest mean probability, int64 (N,), for logits (N, outputs)."""
    if not scores.isfinite().all():
        raise ValueError("the model's logits are not finite for some of the images.")
    logs = scores.double().log_softmax(1)  # in logarithms, as no probability is too small for them
    means = [logs[:, list(group)].logsumexp(1) - math.log(len(group)) for group in groups]
    return torch.stack(means, 1).argmax(1)


def _share(hits: int, decided: int) -> tuple[float, tuple[float, float]]:
    """Return a share and its 95 % interval (Wilson 1927); not a number without a decision."""
    if not decided:
        return math.nan, (math.nan, math.nan)
    share, unit = hits / decided, _Z**2 / decided
    middle = (share + unit / 2) / (1 + unit)
    reach = math.sqrt(share * (1 - share) * unit + unit**2 / 4) / (1 + unit)
    return share, (max(middle - reach, 0.0), min(middle + reach, 1.0))


def _percent(value: float) -> str:
    return "no decision by a cue" if math.isnan(value) else f"{value:.0%}"


def _listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    words = [repr(name) for name in names]
    return ", ".join(words[:20]) + (f" and {len(words) - 20} more" if len(words) > 20 else "")
