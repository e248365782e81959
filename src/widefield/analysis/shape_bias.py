"""Measure shape bias: whether a classifier decides by shape or by texture.

The measure and its images are those of Geirhos, Rubisch, Michaelis, Bethge, Wichmann and Brendel, "ImageNet-trained
CNNs are biased towards texture; increasing shape bias improves accuracy and robustness" (ICLR 2019): among the
decisions that are correct for either cue, the share that is correct for the shape. RepLKNet (Ding et al. 2022, appendix
C) reports it.
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

from widefield import _checks, report
from widefield._intervals import wilson
from widefield.analysis._model import track, visited
from widefield.analysis._result import Result
from widefield.analysis._scores import logits
from widefield.data.conflict import SIXTEEN, ConflictImages
from widefield.data.listing import counted
from widefield.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from widefield.surgery.inputs import place

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ShapeBias(Result):
    """Decisions of a classifier on images whose shape and texture belong to different classes.

    Arrays are int64, (K,) for K classes. Images are counted under the class of their shape.
    """

    title: ClassVar[str] = "Shape bias"
    lead: ClassVar[str] = (
        "Among decisions for the class of the shape or of the texture, the share that chose the shape. Markers: images "
        "of one class of shape, with 95 % intervals. Vertical lines: all images, with the interval as a band. Where "
        "intervals overlap, the order of classes or models may be chance."
    )

    name: str
    about: Mapping[str, Any]
    classes: tuple[str, ...]
    images: np.ndarray
    """Images with conflicting cues."""
    shape: np.ndarray
    """Decisions for the class of the shape."""
    texture: np.ndarray
    """Decisions for the class of the texture."""
    bias: float
    """Shape decisions divided by shape and texture decisions, from 0 to 1; NaN if there are none."""
    interval: tuple[float, float]
    """Wilson's 95 % interval of ``bias``, for independent images. The published ones share shapes and textures."""
    cue_accuracy: float
    """Share of these images that were assigned the class of either cue."""
    left_out: int
    """Images without conflicting cues, which are not counted."""

    def shares(self) -> np.ndarray:
        """Return ``bias`` for each class of shape, float64 (K,); NaN without a correct decision."""
        decided = self.shape + self.texture
        shares: np.ndarray = np.divide(self.shape, decided, out=np.full(len(decided), np.nan), where=decided > 0)
        return shares

    def rows(self) -> list[dict[str, str]]:
        """Return one row for all images, and one per class of shape."""
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
    def reading(cls, results: Mapping[str, ShapeBias]) -> str:
        """Return which cue the models go by, how sure that is, and whose bias is larger."""
        words = [_read(name, result) for name, result in results.items()]
        known = {name: result for name, result in results.items() if not math.isnan(result.bias)}
        if len(known) > 1:
            ranked = sorted(known, key=lambda name: known[name].bias, reverse=True)
            first, second = (known[name] for name in ranked[:2])
            if first.interval[0] > second.interval[1]:
                words.append(f"{ranked[0]} goes by shape more often than {'the others' if ranked[2:] else ranked[1]}.")
            else:
                words.append(f"The intervals of {ranked[0]} and {ranked[1]} overlap: their order may be chance.")
        return " ".join(words)

    @classmethod
    @report.paper()
    def draw(cls, results: Mapping[str, ShapeBias], **options: Any) -> Figure:
        """Draw the share of shape decisions: a marker per model and class, a line per model; takes no options."""
        if options:
            raise TypeError(f"the figure of shape bias takes no options; got {sorted(options)}.")
        classes = sorted({c for r in results.values() for c, n in zip(r.classes, r.images, strict=True) if n})
        labels = [textwrap.fill(f"{name}: {_percent(result.bias)}", 50) for name, result in results.items()]
        lines = sum(label.count("\n") + 1 for label in labels)
        figure = report.blank(report.COLUMN, 0.85 + 0.15 * len(classes) + 0.14 * lines)
        axis = figure.subplots()
        for k, (label, result) in enumerate(zip(labels, results.values(), strict=True)):
            color, marker = report.COLORS[k % len(report.COLORS)], report.MARKERS[k % len(report.MARKERS)]
            aside = 0.44 * (k - (len(results) - 1) / 2) / len(results)  # keeps markers of equal shares apart
            places = [aside + classes.index(name) for name, n in zip(result.classes, result.images, strict=True) if n]
            axis.axvspan(*result.interval, color=color, alpha=0.15, linewidth=0)
            axis.axvline(result.bias, color=color, linewidth=1)
            seen = result.images > 0
            shares, ends = result.shares()[seen], wilson(result.shape, result.shape + result.texture)[seen].T
            axis.errorbar(
                shares, places, xerr=np.abs(ends - shares), fmt=marker, color=color, alpha=0.85, elinewidth=0.8,
                clip_on=False, label=label,
            )  # fmt: skip
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


@_checks.guided
def shape_bias(
    model: nn.Module,
    images: str | Path | ConflictImages,
    *,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    batch_size: int = 8,
    name: str | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> ShapeBias:
    """Measure whether a classifier decides by shape or by texture on images where the two name different classes.

    A model of ImageNet's 1,000 classes chooses among the sixteen classes of the published images: the one whose
    ImageNet classes have the largest mean probability, as the README of github.com/rgeirhos/texture-vs-shape
    recommends. Other models choose among all their ``classes``. Images whose cues agree are left out.

    Args:
        model: maps images (N, 3, size, size) to logits (N, outputs).
        images: a folder with one folder per class of shape and files ``SHAPEi-TEXTUREj.png`` in them: the published
            images, or those of :func:`widefield.data.write_conflicts`. Or such a folder as a
            :class:`widefield.data.ConflictImages`, which states its own size and normalization.
        size: side of a folder's images in pixels, to which other images are resized. Default: 224.
        mean, std: normalization of each channel for pixels in [0, 1], as the model expects it. Default: ImageNet's.
        classes: names of the model's outputs. Default: ImageNet's 1,000.
        batch_size: images at a time.
        name: the model's name in tables and figures. Default: its class name.
        about: facts to store with the result.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: the folder does not exist or has no images.
        OSError: an image cannot be read.
        ValueError, TypeError: file names do not parse; no image has conflicting cues; the model returns no logits;
            ``classes`` do not fit its outputs or the images; an argument is out of range, or of the wrong type.
    """
    shown = _conflicts(images, size, mean, std, batch_size)
    choices = SIXTEEN if classes is None else {str(word): (k,) for k, word in enumerate(classes)}
    _check_classes(shown.classes, choices, classes)
    outputs = 1000 if classes is None else len(classes)
    counts = _decisions(model, shown, choices, outputs, progress)
    seen, by_shape, by_texture = counts.sum(1).tolist()
    if not seen:
        raise ValueError(f"no image in {str(shown.folder)!r} has a shape and a texture of different classes.")
    bias, interval = _share(by_shape, by_shape + by_texture)
    total, hits, misled = counts.numpy()
    return ShapeBias(
        name=type(model).__name__ if name is None else name,
        about={
            **(about or {}),
            "images": seen,
            "source": str(shown.folder),
            "size": shown.size,
            "mean": [round(value, 4) for value in shown.mean],
            "std": [round(value, 4) for value in shown.std],
            "choice": f"of {len(choices)} classes" + (", by mean probability" if classes is None else ""),
        },
        classes=shown.classes,
        images=total,
        shape=hits,
        texture=misled,
        bias=bias,
        interval=interval,
        cue_accuracy=(by_shape + by_texture) / seen,
        left_out=len(shown) - seen,
    )


def _conflicts(
    images: str | Path | ConflictImages,
    size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    batch_size: int,
) -> ConflictImages:
    """Return the images as a data set; raises ValueError for a data set given with another size or normalization."""
    _checks.integer("batch_size", batch_size)
    if not isinstance(images, ConflictImages):
        return ConflictImages(
            images,
            size=224 if size is None else size,
            mean=IMAGENET_MEAN if mean is None else mean,
            std=IMAGENET_STD if std is None else std,
            batch_size=batch_size,
        )
    if any(value is not None for value in (size, mean, std)):
        raise ValueError("size, mean and std belong to a folder; a ConflictImages has its own: set them there.")
    return images


def _check_classes(shown: Sequence[str], choices: Mapping[str, Sequence[int]], classes: Sequence[str] | None) -> None:
    """Raise ValueError unless the model can choose each class of the images, and its classes are unique."""
    for label in shown:
        if label not in choices:
            raise ValueError(
                f"the images show a class {label!r}, which is none of {_listed(choices)}: "
                "pass the names of the model's outputs as classes."
            )
    if classes is not None and len(choices) != len(classes):
        raise ValueError(f"classes must name every output once; got {_listed(classes)}.")


def _decisions(
    model: nn.Module, images: ConflictImages, choices: Mapping[str, Sequence[int]], outputs: int, progress: bool
) -> Tensor:
    """Return how many images with conflicting cues there are, and how many are decided by shape and by texture.

    int64, (3, K) for the K classes of shape.
    """
    # Index of a choice -> class of the images, or -1 if the images have no such class.
    meaning = torch.tensor([images.classes.index(c) if c in images.classes else -1 for c in choices])
    counts = torch.zeros(3, len(images.classes), dtype=torch.int64)
    device, dtype = place(model)
    steps = -(-len(images) // images.batch_size)
    with visited(model), torch.no_grad():
        for sample in track(images, "shape bias", total=steps, show=progress):
            conflict = sample["shape"] != sample["texture"]
            if not conflict.any():
                continue
            shape, texture = sample["shape"][conflict], sample["texture"][conflict]
            scores = logits(model, sample["image"][conflict].to(device, dtype))
            if scores.shape[1] != outputs:
                raise ValueError(
                    f"{type(model).__name__} has {scores.shape[1]} outputs, and classes names {outputs}"
                    f"{' (those of ImageNet, the default)' if choices is SIXTEEN else ''}: pass a name for each output."
                )
            decisions = meaning[_choice(scores.cpu(), list(choices.values()))]
            for row, hit in zip(counts, (decisions > -2, decisions == shape, decisions == texture), strict=True):
                row += torch.bincount(shape[hit], minlength=len(row))
    return counts


def _choice(scores: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Return the group of outputs with the largest mean probability, int64 (N,), for logits (N, outputs)."""
    if not scores.isfinite().all():
        raise ValueError("the model's logits are not finite for some of the images.")
    logs = scores.double().log_softmax(1)  # logarithms do not underflow
    means = [logs[:, list(group)].logsumexp(1) - math.log(len(group)) for group in groups]
    return torch.stack(means, 1).argmax(1)


def _read(name: str, result: ShapeBias) -> str:
    """Return which cue a model goes by."""
    shape, texture, images = (int(counts.sum()) for counts in (result.shape, result.texture, result.images))
    if math.isnan(result.bias):
        return f"{name} chose neither the class of the shape nor that of the texture in {counted(images, 'image')}."
    low, high = result.interval
    side = "shape" if low > 0.5 else "texture" if high < 0.5 else "neither cue for certain"
    decided = counted(shape + texture, "decision")
    words = (
        f"{name} goes by {side}: {shape} of {decided} for either cue chose the shape ({result.bias:.0%}, 95% interval "
        f"{100 * low:.0f} to {100 * high:.0f}%)."
    )
    missed = images - shape - texture
    return f"{words} It chose another class in {missed} of {counted(images, 'image')}." if missed else words


def _share(hits: int, decided: int) -> tuple[float, tuple[float, float]]:
    """Return a share and its 95 % interval (Wilson 1927); NaN without a decision."""
    if not decided:
        return math.nan, (math.nan, math.nan)
    low, high = wilson(np.array(hits), np.array(decided)).tolist()
    return hits / decided, (low, high)


def _percent(value: float) -> str:
    return "no decision by a cue" if math.isnan(value) else f"{value:.0%}"


def _listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    words = [repr(name) for name in names]
    return ", ".join(words[:20]) + (f" and {len(words) - 20} more" if len(words) > 20 else "")
