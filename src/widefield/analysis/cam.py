"""Compute class activation maps, which show where a class is seen (Grad-CAM: Selvaraju et al. 2017, section 3)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widefield import _checks, report
from widefield.analysis._cam_figure import mark, mark_box, mark_point, overlay, shown
from widefield.analysis._cam_layer import target_layer
from widefield.analysis._cam_methods import METHODS, NAMES, Seen
from widefield.analysis._detectors import DetectionScore
from widefield.analysis._keypoints import KeypointPeak, is_pose_model
from widefield.analysis._maps import tapped
from widefield.analysis._model import Layer, chunks, layer_name, never_called, track, visited
from widefield.analysis._result import Result
from widefield.analysis._scores import class_scores
from widefield.analysis._targets import ClassAt, ClassIn, Target, keypoint_text, label_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KEPT = 224  # largest side of the images stored in a result
_COARSE = 4  # sides of maps below which the center's share says nothing: that of a map of 2x2 is always 25 %
_SMALL = 6.5  # font size under a picture, in points
_BAR = 0.75  # width of the color bar, in inches
_TALL = 1.8  # height of pictures below which a long label does not fit its color bar, in inches


@dataclass(frozen=True)
class ClassActivation(Result):
    """Class activation maps of one model, one class per image."""

    name: str
    about: Mapping[str, Any]
    layer: str
    """Name of the layer."""
    size: tuple[int, int]
    """(H, W) of the images in pixels."""
    maps: np.ndarray
    """(N, h, w), float32, at the layer's resolution: not negative, each with a maximum of 1, or 0 everywhere."""
    targets: np.ndarray
    """(N,), int64: class, or key point, of each map; -1 if it is the predicted one and a detector detects nothing."""
    predicted: np.ndarray
    """(N,), int64: the class with the largest score; for segmentation the one that covers the most pixels; -1 as above.
    """
    probability: np.ndarray
    """(N,), float32: probability of the target, by softmax (logistic function for a single score). Segmentation: its
    mean over the pixels of the class. Detector: the highest score of the class's detections. Pose model: the height of
    the key point's peak, cut at 0 and 1.
    """
    labels: tuple[str, ...]
    """Names of the N targets."""
    area: np.ndarray
    """(N,), float64: share of the image where the map, at the image's resolution, exceeds half its maximum; NaN for an
    empty map.
    """
    central: np.ndarray
    """(N,), float64: share of the map's sum in the middle half of both sides, 0.25 for an even map; NaN as above."""
    pixels: np.ndarray | None
    """(N, H, W, C), float32 in [0, 1]: the images for the figure, at most 224 pixels a side."""
    where: np.ndarray | None = None
    """(H, W), bool: the pixel or region whose class logit is explained; None: the class as a whole."""
    boxes: np.ndarray | None = None
    """(N, 4), float64: (left, top, right, bottom) in pixels of the boxes whose class logits are explained; NaN if there
    is no such detection. None: the class as a whole."""
    points: np.ndarray | None = None
    """(N, 2), float64: of a pose model, the key points that are explained, x and y in pixels. None: other models."""

    title = "Class activation maps"
    lead = (
        "Where a layer's map speaks for the class: the positive part of the map, its channels or positions weighted by "
        "the method in the table (Grad-CAM: by the mean gradient of the class's score), scaled to a maximum of 1 per "
        "image and model: positions compare, magnitudes do not. The contour is at half the maximum; under each map are "
        "the class and its probability. Table: share of the image above that half, and share of the map in the central "
        "quarter of the image (25 % for an even map; none for maps below 4x4), ± standard deviations over images; an "
        "empty map is 0 everywhere."
    )

    @property
    def empty(self) -> int:
        """Number of maps that are 0 everywhere: no position of the layer supports the class."""
        return int((self.maps.max((1, 2)) == 0).sum())

    def upsampled(self) -> np.ndarray:
        """Return the maps at the images' size, (N, H, W), float32, by bilinear interpolation."""
        return upsampled(torch.from_numpy(self.maps), self.size).numpy()

    def to_dict(self) -> dict[str, Any]:
        """Return all values in JSON's types, except the copies of the images and the mask of a region."""
        return {key: value for key, value in super().to_dict().items() if key not in ("pixels", "where")}

    def rows(self) -> list[dict[str, str]]:
        """Return one row: the extent of the maps, and their concentration in the center."""
        return [
            {
                "model": self.name,
                "layer": self.layer,
                "method": str(self.about.get("method", "")),
                "map": "×".join(map(str, self.maps.shape[1:])),
                "above half (%)": _percent(self.area),
                "in the center (%)": _percent(self.central) if min(self.maps.shape[1:]) >= _COARSE else "–",
                "empty": f"{self.empty} of {len(self.maps)}",
            }
        ]

    @classmethod
    def reading(cls, results: Mapping[str, ClassActivation]) -> str:
        """Return over how much of the image maps are bright, on average."""
        known = {name: result.area[np.isfinite(result.area)] for name, result in results.items()}
        parts = [f"{100 * area.mean():.0f} % of the image for {name}" for name, area in known.items() if area.size]
        return f"Maps are above half of their maximum on {', '.join(parts)}, on average." if parts else ""

    @classmethod
    @report.paper()
    def draw(cls, results: Mapping[str, ClassActivation], *, count: int = 8) -> Figure:
        """Draw one row per image and one column per model, on one scale (MoRF, figure 6).

        Args:
            results: of the same images.
            count: number of images, from the first.

        Raises:
            ValueError: results of different numbers of images.
        """
        numbers = {len(result.maps) for result in results.values()}
        if len(numbers) != 1:
            raise ValueError(f"all results must be of the same images; got {sorted(numbers)} images.")
        count = min(_checks.integer("count", count), *numbers)
        first = next(iter(results.values()))
        columns = len(results) + (first.pixels is not None)
        height, width = first.size
        # As wide as a page and no higher than one: pictures of 0.8 to 1.45 inches.
        cell = max(0.8, min(1.45, (report.PAGE - _BAR) / columns, (9 / count - 0.2) * width / height))
        letters = _letters(cell, _SMALL)
        short = all(len(label) + 8 <= letters for result in results.values() for label in result.labels[:count])
        titles = [_wrapped(name, _letters(cell, 8)) for name in results]
        top = 0.13 * max(title.count("\n") + 1 for title in titles) + 0.1
        figure = report.blank(columns * cell + _BAR, count * (cell * height / width + (0.16 if short else 0.26)) + top)
        axes = figure.subplots(count, columns, squeeze=False)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        if first.pixels is not None:
            axes[0, 0].set_title("image")
            for axis, image in zip(axes[:, 0], first.pixels, strict=False):
                axis.imshow(shown(image), extent=(0, 1, 1, 0), aspect=height / width)
        shades: list[Any] = []
        for column, (title, result) in enumerate(zip(titles, results.values(), strict=True), columns - len(results)):
            axes[0, column].set_title(title)
            maps = result.upsampled()
            for row, axis in enumerate(axes[:, column]):
                shades.append(overlay(axis, maps[row], None if result.pixels is None else result.pixels[row]))
                mark(axis, result.where)
                if result.boxes is not None:
                    mark_box(axis, result.boxes[row], result.size)
                if result.points is not None:
                    mark_point(axis, result.points[row], result.size)
                label = result.labels[row]
                label = label if len(label) <= letters else f"{label[: letters - 1]}…"
                text = f"{label}{', ' if short else chr(10)}{result.probability[row] * 100:.2g} %"
                axis.set_xlabel(text, fontsize=_SMALL, labelpad=2)
        bar: Any = figure.colorbar(shades[0], ax=axes, shrink=min(1.0, 2.4 / (count * cell)), pad=0.02, aspect=25)
        bar.solids.set_alpha(1)  # or the bar would be paler than the maps, which lie over the images
        tall = count * cell * height / width > _TALL
        bar.set_label("share of the map's maximum" if tall else "share of\nthe maximum")
        return figure


@_checks.guided
def class_activation(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    targets: int | Sequence[int] | Tensor | ClassAt | ClassIn | DetectionScore | KeypointPeak | None = None,
    layer: Layer | None = None,
    method: str | None = None,
    classes: Sequence[str] | None = None,
    pixels: Tensor | np.ndarray | None = None,
    batch_size: int = 8,
    name: str | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> ClassActivation:
    """Compute Grad-CAM maps (Selvaraju et al. 2017, equations 1 and 2), as captum's LayerGradCam does.

    A layer's map (C, h, w) is summed over channels, each weighted by the mean gradient of the class's score (before
    softmax). The positive part is scaled to a maximum of 1. Tokens and channels-last maps work as well, as in ViT and
    Swin. The model is left unchanged.

    The score of a class depends on the model. Classifier: its logit. Segmentation model: the mean logit of the pixels
    predicted as that class, or of all pixels if there are none (Seg-Grad-CAM, Vinogradova et al. 2020, section 3).
    Detector: the sum of the scores of that class's detections, so an image without any has an empty map. Pose models
    have key points in place of classes; the score is the height of the heatmap's peak.

    ``targets=ClassAt(...)`` and ``ClassIn(...)`` explain what a segmentation model says at one pixel or in a region
    instead: the class's logit there, or its mean, at the images' resolution. ``targets=DetectionScore(...)`` explains
    one detection, or one box, of a detector of ``widefield.dense`` by the class's logit for it. Such a logit, like the
    peak of a heatmap, depends on a part of the map only, so the map is multiplied with its gradient position by
    position, without the mean over positions (HiResCAM: Draelos and Carin 2020, equation 4).

    Args:
        model: returns scores (N, classes), maps of logits (N, classes, h, w), or torchvision's detections, alone, as
            "logits" or "out", or as the only tensor of its output.
        images: normalized images (N, C, H, W), or batches of them, all of one size. Video clips (N, C, T, H, W) get
            one map each: time steps of a layer's map count as further channels.
        targets: one class for all images, or one per image; for segmentation models also a pixel (`ClassAt`) or a
            region (`ClassIn`), for detectors a detection or a box (`DetectionScore`), for pose models a key point
            (`KeypointPeak`). Default: the class with the largest score; for segmentation the one that covers the most
            pixels, for detectors the one with the largest sum of scores, for pose models the highest peak.
        layer: a layer that returns a map, or its name. Default: that of :func:`target_layer`.
        method: ``"grad_cam"`` (default); ``"hires_cam"``, as for such parts, and their default; ``"grad_cam++"``
            (Chattopadhay et al. 2018); ``"layer_cam"`` (Jiang et al. 2021), for layers with large maps, too;
            ``"eigen_cam"`` (Muhammad and Yeasin 2020), which does not depend on the class; ``"score_cam"`` (Wang et al.
            2020), without gradients, one forward pass for each channel of the layer.
        classes: class names in the order of the scores.
        pixels: the images as drawn in figures, (N, H, W, C) in [0, 1]. Default: figures show only the maps.
        batch_size: images at a time.
        name: the model's name in tables and figures. Default: its class name.
        about: facts to store with the result.
        progress: show a progress bar.

    Raises:
        ValueError: the outputs have another form or are not finite; a detector detects nothing in any image and there
            are no targets; a class is out of range; targets, class names or pixels do not match the images; the layer
            does not exist, is not called, returns no map or does not affect the scores; no layer is suitable; images
            differ in size, or there are none.
        TypeError: images, targets, layer or batch size have the wrong type.
    """
    _checks.integer("batch_size", batch_size)
    local = isinstance(targets, (DetectionScore, KeypointPeak)) or is_pose_model(model)
    usual = "hires_cam" if local else "grad_cam"  # a mean gradient would also show what is far from the box or point
    method = usual if method is None else _checks.choice("method", method, tuple(METHODS))
    special = ClassAt, ClassIn, DetectionScore, KeypointPeak
    target = targets if isinstance(targets, special) else None
    wanted = targets.label if isinstance(targets, special) else _targets(targets)
    kept = None if pixels is None else _pixels(pixels)
    name_of_layer = None if layer is None else layer_name(model, layer)
    each: dict[str, Sized] = {} if wanted is None or isinstance(wanted, int) else {"targets": wanted}
    if kept is not None:
        each["pixels"] = kept
    total = None
    if isinstance(images, Tensor) and images.ndim in (4, 5):
        total = -(-len(images) // batch_size)
        _one_each(each, len(images))
    parts: list[tuple[Tensor, ...]] = []
    size: tuple[int, ...] = ()
    done = 0
    batches = chunks(images, model, batch_size, clips=True)
    for part in track(batches, "class activation maps", total=total, show=progress):
        size = size or tuple(part.shape[2:])
        if tuple(part.shape[2:]) != size:
            raise ValueError(f"images must all be of one size; got {size} and {tuple(part.shape[2:])}.")
        _one_each(each, done + len(part), more=True)
        if kept is not None:
            _in_proportion(pixels, size[-2:])
        if name_of_layer is None:
            name_of_layer = target_layer(model, part[:1])
        chosen = wanted[done : done + len(part)] if isinstance(wanted, list) else wanted
        parts.append(_maps(model, name_of_layer, part, _Asked(chosen, target, classes, method)))
        done += len(part)
    _one_each(each, done)
    maps, targeted, predicted, probability, boxes, points = (torch.cat(part) for part in zip(*parts, strict=True))
    _check_detected(model, targeted)
    peak = maps.amax((1, 2), keepdim=True)
    maps = maps / torch.where(peak > 0, peak, 1)
    area, central = _extent(upsampled(maps, size[-2:]))
    return ClassActivation(
        name=type(model).__name__ if name is None else name,
        about={
            **(about or {}),
            "images": done,
            "size": size[-1] if size[-2] == size[-1] else list(size[-2:]),
            **({"frames": size[0]} if len(size) == 3 else {}),
            "layer": name_of_layer,
            "method": NAMES[method],
            "class": "predicted" if wanted is None else "given",
            **({"of": target.place(size[-2:])} if target else {}),
        },
        layer=str(name_of_layer),
        size=(size[-2], size[-1]),
        maps=maps.numpy(),
        targets=targeted.numpy(),
        predicted=predicted.numpy(),
        probability=probability.numpy(),
        labels=tuple(_NOTHING if k < 0 else _named(model, k, classes) for k in targeted.tolist()),
        area=area,
        central=central,
        pixels=kept,
        where=target.where(size[-2:]).numpy() if isinstance(target, (ClassAt, ClassIn)) else None,
        boxes=boxes.double().numpy() if isinstance(target, DetectionScore) else None,
        points=points.double().numpy() if is_pose_model(model) and points.isfinite().all() else None,
    )


@dataclass(frozen=True)
class _Asked:
    """What the maps of one batch explain."""

    labels: int | list[int] | None
    """The class of every image, or of each; None: the predicted one."""
    target: Target | DetectionScore | KeypointPeak | None
    """The pixel, region, box or peak; None: the class as a whole."""
    names: Sequence[str] | None
    method: str


def _maps(model: nn.Module, layer: str, images: Tensor, asked: _Asked) -> tuple[Tensor, ...]:
    """Return maps (N, h, w) before scaling, targets, predicted classes, probabilities, boxes and points, on the CPU."""
    with (
        visited(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        tapped(model, layer, images.shape[2:]) as taps,
    ):
        scorer = _Scorer(model, layer, taps, asked)
        scores = scorer(images.clone().detach())
        found, told = taps[-1], scorer.seen

        def gradient() -> Tensor:
            try:
                return torch.autograd.grad(scores.sum(), found)[0]
            except RuntimeError as error:
                raise ValueError(
                    f"layer {layer!r} of {type(model).__name__} does not affect the scores through a gradient: choose "
                    f"another layer. ({str(error).splitlines()[0]})"
                ) from error

        @torch.no_grad()
        def score(others: Tensor, rows: Tensor) -> Tensor:
            labels = told[0][rows.cpu()].clamp(min=0).tolist()
            return _Scorer(model, layer, taps, replace(asked, labels=labels))(others)

        maps = METHODS[asked.method](Seen(found.detach(), gradient, images, score))
    return maps.float().cpu(), *told


def _named(model: nn.Module, label: int, names: Sequence[str] | None) -> str:
    return keypoint_text(label, names) if is_pose_model(model) else label_text(label, names)


def _check_detected(model: nn.Module, targets: Tensor) -> None:
    if (targets < 0).all():
        shown = "this image" if len(targets) == 1 else f"these {len(targets)} images"
        raise ValueError(
            f"{type(model).__name__} detects nothing in {shown}, so no class is predicted: give targets, "
            "other images, or a lower threshold (score_thresh in torchvision)."
        )


class _Scorer:
    """The score of one class per image, to differentiate; other results of the run are kept in ``seen``."""

    def __init__(self, model: nn.Module, layer: str, taps: Sequence[Tensor], asked: _Asked) -> None:
        self.model, self.layer, self.taps, self.asked = model, layer, taps, asked
        self.seen: tuple[Tensor, ...] = ()

    def __call__(self, images: Tensor) -> Tensor:
        scores = class_scores(self.model, images, target=self.asked.target)
        if not self.taps:
            raise never_called(self.model, self.layer)
        given, names = self.asked.labels, self.asked.names
        given = [given] * len(images) if isinstance(given, int) else given
        scores = scores.upto(max(len(names or ()), 1 + max(given or [0])))
        total = scores.values.shape[1]
        if names is not None and len(names) != total:
            raise ValueError(f"classes has {len(names)} names, but the model returns {total} scores.")
        chosen = scores.predicted
        if given is not None:
            if max(given) >= total:
                raise ValueError(f"targets must be classes from 0 to {total - 1}; got {max(given)}.")
            chosen = torch.tensor(given, device=chosen.device)
        boxes = torch.full((len(images), 4), torch.nan) if scores.boxes is None else scores.boxes.cpu()
        if scores.boxes is not None:  # without such a detection there is nothing to explain, also if a class is given
            chosen = chosen.masked_fill(scores.predicted < 0, -1)
        place = chosen.clamp(min=0)[:, None]
        points = torch.full((len(images), 2), torch.nan)
        if scores.points is not None:
            points = scores.points.gather(1, place[..., None].expand(-1, -1, 2))[:, 0].cpu()
        probability = scores.probability.gather(1, place)[:, 0].cpu()
        self.seen = chosen.cpu(), scores.predicted.cpu(), probability, boxes, points
        value = scores.values.gather(1, place)[:, 0]
        # Without detections the gradient must exist as well; the map is then empty.
        return value if scores.known and scores.boxes is None else value + 0 * self.taps[-1].sum()


_NOTHING = "nothing detected"
"""Label of an image without detections."""


def _targets(targets: int | Sequence[int] | Tensor | None) -> int | list[int] | None:
    if targets is None:
        return None
    if isinstance(targets, (Tensor, np.ndarray)):
        targets = targets.tolist()
    if isinstance(targets, (list, tuple)):
        return [_checks.integer("every entry of targets", k, minimum=0) for k in targets]
    return _checks.integer("targets", targets, minimum=0)


def _one_each(given: Mapping[str, Sized], images: int, *, more: bool = False) -> None:
    """Raise ValueError unless each of these has one entry per image; ``more``: further images may follow."""
    for what, entries in given.items():
        if len(entries) < images or (len(entries) > images and not more):
            there = f"{images} images{' or more' if more else ''}"
            raise ValueError(f"{what} has {len(entries)} entries for {there}: give one each.")


def _pixels(pixels: Tensor | np.ndarray) -> np.ndarray:
    """Check images for figures; return copies of at most `_KEPT` pixels a side, float32."""
    given = torch.as_tensor(pixels).detach().cpu()
    if given.ndim != 4 or not given.is_floating_point():
        hint = " Pass pixels / 255." if given.dtype == torch.uint8 and given.ndim == 4 else ""
        raise ValueError(
            f"pixels must be floating-point numbers (N, H, W, C); got {given.dtype} {tuple(given.shape)}.{hint}"
        )
    low, high = (float(v) for v in given.aminmax()) if given.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"pixels must lie in [0, 1]; got {low:.3g} to {high:.3g}. Pictures.shown converts normalized images."
        )
    small = given.float().movedim(-1, 1)
    if max(small.shape[2:]) > _KEPT:
        share = _KEPT / max(small.shape[2:])
        small = F.interpolate(small, [max(1, round(side * share)) for side in small.shape[2:]], mode="area")
    return small.movedim(1, -1).numpy().copy()


def _in_proportion(pixels: Tensor | np.ndarray | None, size: Sequence[int]) -> None:
    """Raise ValueError if pixels (N, H, W, C) do not have the proportions of images of this size."""
    shape = () if pixels is None else tuple(pixels.shape)
    H, W = size
    fits = [abs(h * W - w * H) <= max(H, W) for h, w in (shape[1:3], shape[2:4])]
    if not fits[0] or (fits[1] and shape[1] in (1, 3) and shape[3] not in (1, 3)):
        hint = " They look like (N, C, H, W): pass pixels.movedim(1, -1)." if fits[1] else ""
        raise ValueError(
            f"pixels must be (N, H, W, C), with sides as those of the images, which are {H}x{W}; got {shape}.{hint}"
        )


def upsampled(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps (N, h, w) at another size, (N, H, W), by bilinear interpolation."""
    return F.interpolate(maps[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]


def _extent(maps: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return, for maps (N, H, W) with a maximum of 1, the shares above one half and in the central quarter."""
    maps = maps.double()
    H, W = maps.shape[1:]
    total = maps.sum((1, 2))
    area = (maps > 0.5).double().mean((1, 2))
    middle = maps[:, H // 4 : H - H // 4, W // 4 : W - W // 4].sum((1, 2))
    return torch.where(total > 0, area, torch.nan).numpy(), (middle / total).numpy()


def _percent(shares: np.ndarray) -> str:
    shares = shares[np.isfinite(shares)] * 100
    return f"{shares.mean():.1f} ± {shares.std():.1f}" if len(shares) else "–"


def _letters(inches: float, points: float) -> int:
    """Return about how many letters of this size fit into a width."""
    return max(8, int(inches * 72 / (0.6 * points)))


def _wrapped(name: str, letters: int) -> str:
    """Break a name into lines, preferably between words."""
    lines = [""]
    for word in re.findall(r".+?(?:[_ ,:/]+|(?={)|$)", name):
        for part in (word[start : start + letters] for start in range(0, len(word), letters)):
            if len(lines[-1]) + len(part.rstrip()) > letters:
                lines.append("")
            lines[-1] += part
    return "\n".join(line for line in lines if line)
