"""Encode key points as heatmaps and decode them, by the rules of OpenMMLab's mmpose.

A heatmap has a peak where its key point is. Images and heatmaps differ in scale. Two conventions relate them: in
``"msra"`` (Xiao, Wu, Wei, "Simple Baselines for Human Pose Estimation and Tracking", ECCV 2018) a pixel of the heatmap
stands for as many pixels of the image as their widths differ; in ``"udp"`` (Huang, Zhu, Guo, Huang, "The Devil Is in
the Details: Delving into Unbiased Data Processing for Human Pose Estimation", CVPR 2020) the centers of the corner
pixels meet. DARK is Zhang, Zhu, Dai, Ye, Zhu, "Distribution-Aware Coordinate Representation for Human Pose
Estimation", CVPR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from widefield import _checks
from widefield.dense.layers import widened

CODECS = ("msra", "unbiased", "udp")
"""Ways to write and read heatmaps: see :class:`HeatmapCodec`."""

_LEAST = 1e-10
_UDP_RANGE = (1e-3, 50.0)


class DecodedKeypoints(NamedTuple):
    """Key points read from heatmaps.

    Attributes:
        points: (N, K, 2), x and y in pixels of the image.
        scores: (N, K), the heatmaps' largest values.
    """

    points: Tensor
    scores: Tensor


@dataclass(frozen=True)
class HeatmapCodec:
    """How key points become heatmaps, and heatmaps key points.

    Args:
        image_size: (height, width) of the images in pixels.
        heatmap_size: (height, width) of the heatmaps.
        sigma: standard deviation of a peak in pixels of the heatmap. Published: 2 for 64x48, 3 for 96x72.
        kind: one of these:

            - "msra": a Gaussian around the nearest pixel; read at the largest value, moved by a quarter of a pixel
              towards the larger neighbor;
            - "unbiased": a Gaussian around the point itself; read with DARK, a Newton step on the logarithm;
            - "udp": the same with the corner pixels aligned. The window is three sigma wide.
        blur: side of the Gaussian that smooths heatmaps before DARK, in pixels, odd. Published: 11 for a sigma of 2, 17
            for 3.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    image_size: tuple[int, int]
    heatmap_size: tuple[int, int]
    sigma: float = 2.0
    kind: str = "msra"
    blur: int = 11

    def __post_init__(self) -> None:
        _checks.choice("kind", self.kind, CODECS)
        if not _checks.number("sigma", self.sigma):
            raise ValueError("sigma must be above 0, the width of a peak; got 0.")
        if _checks.integer("blur", self.blur) % 2 == 0:
            raise ValueError(f"blur must be odd, so that it has a center; got {self.blur}.")
        for name, size in (("image_size", self.image_size), ("heatmap_size", self.heatmap_size)):
            for side in size:
                _checks.integer(f"a side of {name}", side, minimum=2)

    def scale(self, like: Tensor) -> Tensor:
        """Return pixels of the image per pixel of the heatmap, (2,), for x and y."""
        less = 1 if self.kind == "udp" else 0
        pairs = zip(reversed(self.image_size), reversed(self.heatmap_size), strict=True)
        return like.new_tensor([(image - less) / (heatmap - less) for image, heatmap in pairs])

    def encode(self, points: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Return heatmaps, and the weights of the key points.

        Args:
            points: (..., K, 2), x and y in pixels of the image.
            visible: (..., K), 0 for key points without a label.

        Returns:
            Heatmaps (..., K, H, W) with peaks of height 1, and weights (..., K): ``visible``, and 0 where the peak has
            no pixel in the heatmap. The heatmaps of key points with weight 0 are 0.
        """
        height, width = self.heatmap_size
        points = widened(points) / self.scale(widened(points))
        nearest = (points + 0.5).trunc()
        center = nearest if self.kind == "msra" else points
        middle = points if self.kind == "unbiased" else nearest
        radius = self.sigma * 3
        x, y = (torch.arange(side, device=points.device, dtype=points.dtype) for side in (width, height))
        axes = []
        inside = visible != 0
        for axis, grid in enumerate((x, y)):
            low, high = ((middle[..., axis] + sign * radius).trunc() for sign in (-1, 1))
            inside = inside & (low < len(grid)) & (high + 1 >= 0)
            peak = torch.exp(-((grid - center[..., axis, None]) ** 2) / (2 * self.sigma**2))
            if self.kind != "unbiased":
                peak = peak * ((grid >= low[..., None]) & (grid <= high[..., None]))
            axes.append(peak * inside[..., None])
        weights = torch.where(inside, visible.to(points), 0.0)
        return axes[1][..., :, None] * axes[0][..., None, :], weights

    def decode(self, heatmaps: Tensor) -> DecodedKeypoints:
        """Return the key points of heatmaps (N, K, H, W) with the published numbers.

        Two things differ from :meth:`widefield.dense.HeatmapPose.decode`, which inverts :meth:`encode`. Published code
        writes "udp" by (image - 1) / (heatmap - 1) and reads it by image / (heatmap - 1), so points are too far from
        the origin by image / (image - 1). And steps below one pixel have no limit.

        Key points without a value above 0 are at (-1, -1) of the heatmap, as published.
        """
        read = _read(heatmaps, self.kind, self.blur)
        x, y = (read.pixels + read.steps).unbind(-1)
        x, y = (torch.where(read.scores > 0, axis, -1.0) for axis in (x, y))
        less = 1 if self.kind == "udp" else 0
        (image_rows, image_columns), (rows, columns) = self.image_size, self.heatmap_size
        x, y = x * image_columns / (columns - less), y * image_rows / (rows - less)
        return DecodedKeypoints(torch.stack((x, y), 2), read.scores)


def decoded(heatmaps: Tensor, image_size: Sequence[int], kind: str, blur: int) -> DecodedKeypoints:
    """Return the key points of heatmaps (N, K, H, W), in pixels of the images: the inverse of encoding.

    There is no step below one pixel where the heatmap has no maximum to step to: where the matrix of second derivatives
    is not negative definite, or where the step is longer than half the blur. Flat heatmaps would otherwise give points
    thousands of pixels away. Key points without a value above 0 are at (-1, -1) of the heatmap.

    Sizes may be symbols, so that graphs for any size can be traced.
    """
    read = _read(heatmaps, kind, blur)
    longest = max(1, (blur - 1) // 2)
    sound = read.peaked & (read.steps.abs() <= longest).all(-1)
    x, y = (read.pixels + torch.where(sound[..., None], read.steps, 0.0)).unbind(-1)
    x, y = (torch.where(read.scores > 0, axis, -1.0) for axis in (x, y))
    less = 1 if kind == "udp" else 0
    x = x * (image_size[1] - less) / (heatmaps.shape[3] - less)
    y = y * (image_size[0] - less) / (heatmaps.shape[2] - less)
    return DecodedKeypoints(torch.stack((x, y), 2), read.scores)


class _Read(NamedTuple):
    """What heatmaps (N, K, H, W) hold, in pixels of the heatmaps."""

    pixels: Tensor
    """(N, K, 2): x and y of the largest values."""
    steps: Tensor
    """(N, K, 2): from there to the key points."""
    peaked: Tensor
    """Bool (N, K): the second-order expansion has a maximum."""
    scores: Tensor
    """(N, K): the largest values."""


def _read(heatmaps: Tensor, kind: str, blur: int) -> _Read:
    heatmaps = widened(heatmaps)
    width = heatmaps.shape[3]
    scores, places = heatmaps.flatten(2).max(2)
    rows = places // width
    pixels = torch.stack((places - rows * width, rows), 2)  # ONNX has no remainder of a symbol
    if kind == "msra":
        steps, peaked = 0.25 * _towards_larger(heatmaps, pixels), torch.ones_like(scores, dtype=torch.bool)
    else:
        smooth = _blurred(heatmaps, blur, scores)
        steps, peaked = _udp_step(smooth, pixels) if kind == "udp" else _newton_step(smooth, pixels)
    return _Read(pixels.to(heatmaps), steps, peaked, scores)


def flipped_heatmaps(heatmaps: Tensor, swapped: Sequence[int], *, shift: bool) -> Tensor:
    """Return the heatmaps of mirrored images as those of the images.

    Args:
        heatmaps: (N, K, H, W).
        swapped: the key point that each one becomes in a mirrored image; left and right change places.
        shift: move them by one pixel to the right, which the "msra" convention needs. The first column stays.
    """
    turned = heatmaps.flip(3)[:, list(swapped)]
    return torch.cat((turned[..., :1], turned[..., :-1]), 3) if shift else turned


# Refinement below one pixel


def _around(heatmaps: Tensor, pixels: Tensor, reach: int) -> Tensor:
    """Return the values around each pixel (N, K, 2) of heatmaps (N, K, H, W): (N, K, 2 * reach + 1, 2 * reach + 1).

    Beyond the border the nearest value continues. Rows come first, as in the heatmaps.
    """
    height, width = heatmaps.shape[2:]
    steps = torch.arange(-reach, reach + 1, device=pixels.device)
    columns = (pixels[..., 0, None] + steps).clamp(0, width - 1)
    rows = (pixels[..., 1, None] + steps).clamp(0, height - 1)
    places = rows[..., :, None] * width + columns[..., None, :]
    values: Tensor = heatmaps.flatten(2).gather(2, places.flatten(2)).unflatten(2, places.shape[2:])
    return values


def _within(pixels: Tensor, heatmaps: Tensor, margin: int) -> Tensor:
    """Return for x and y whether a pixel is more than 1 from the first and ``margin`` from the last one: (N, K, 2)."""
    height, width = heatmaps.shape[2:]
    before_last = torch.stack((pixels[..., 0] < width - margin, pixels[..., 1] < height - margin), -1)
    return (pixels > 1) & before_last


def _towards_larger(heatmaps: Tensor, pixels: Tensor) -> Tensor:
    """Return -1, 0 or 1 for x and y: the direction of the larger neighbor, 0 near the border."""
    near = _around(heatmaps, pixels, 1)
    slopes = torch.stack((near[..., 1, 2] - near[..., 1, 0], near[..., 2, 1] - near[..., 0, 1]), -1)
    beside = (pixels > 0).flip(-1)  # a row or column of its own: published code skips the first
    return slopes.sign() * (_within(pixels, heatmaps, 1) & beside)


def _blurred(heatmaps: Tensor, side: int, highest: Tensor) -> Tensor:
    """Smooth heatmaps with a Gaussian, beyond the border with zeros, and scale each to its former maximum."""
    reach = (side - 1) // 2
    sigma = 0.3 * (reach - 1) + 0.8  # OpenCV's choice for this side
    steps = torch.arange(-reach, reach + 1, device=heatmaps.device, dtype=heatmaps.dtype)
    total = torch.exp(-(steps**2) / (2 * sigma**2)).sum()

    def smoothing(length: int) -> Tensor:
        """Return the filter as a matrix: convolutions of one channel are slow."""
        places = torch.arange(length, device=heatmaps.device, dtype=heatmaps.dtype)
        gaps = places[:, None] - places
        return torch.where(gaps.abs() <= reach, torch.exp(-(gaps**2) / (2 * sigma**2)) / total, 0.0)

    height, width = heatmaps.shape[2:]
    smooth = smoothing(height) @ (heatmaps @ smoothing(width))
    peaks = smooth.amax((2, 3))
    scaled: Tensor = smooth * torch.where(peaks > 0, highest / peaks, 1.0)[..., None, None]
    return scaled


def _newton_step(heatmaps: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the step to the maximum of the logarithm's second-order expansion (DARK, eq. 6), and whether it has one.

    Near the border the step is 0.
    """
    near = _around(heatmaps.clamp(min=_LEAST).log(), pixels, 2)
    dx, dy = (near[..., 2, 3] - near[..., 2, 1]) / 2, (near[..., 3, 2] - near[..., 1, 2]) / 2
    dxx = (near[..., 2, 4] - 2 * near[..., 2, 2] + near[..., 2, 0]) / 4
    dyy = (near[..., 4, 2] - 2 * near[..., 2, 2] + near[..., 0, 2]) / 4
    dxy = (near[..., 3, 3] - near[..., 1, 3] - near[..., 3, 1] + near[..., 1, 1]) / 4
    step, peaked = _solved(dx, dy, dxx, dyy, dxy)
    return torch.where(_within(pixels, heatmaps, 2).all(-1, keepdim=True), step, 0.0), peaked


def _udp_step(heatmaps: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same as UDP's code takes it: neighbors at one pixel, also at the border."""
    near = _around(heatmaps.clamp(*_UDP_RANGE).log(), pixels, 1)
    here, right, left, below, above = (
        near[..., 1, 1],
        near[..., 1, 2],
        near[..., 1, 0],
        near[..., 2, 1],
        near[..., 0, 1],
    )
    dxx, dyy = right - 2 * here + left, below - 2 * here + above
    dxy = (near[..., 2, 2] - right - below + 2 * here - left - above + near[..., 0, 0]) / 2
    small = torch.finfo(torch.float32).eps
    return _solved((right - left) / 2, (below - above) / 2, dxx + small, dyy + small, dxy)


def _solved(dx: Tensor, dy: Tensor, dxx: Tensor, dyy: Tensor, dxy: Tensor) -> tuple[Tensor, Tensor]:
    """Return minus the inverse of the matrix of second derivatives times the first ones; 0 if it has no inverse.

    The second result says whether the matrix is negative definite, so that the step leads to a maximum.
    """
    determinant = dxx * dyy - dxy**2
    step = torch.stack((dxy * dy - dyy * dx, dxy * dx - dxx * dy), -1)
    safe = torch.where(determinant == 0, 1.0, determinant)
    return torch.where((determinant == 0)[..., None], 0.0, step / safe[..., None]), (determinant > 0) & (dxx < 0)
