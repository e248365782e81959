"""Cut the surroundings of boxes out of images: affine crops of one size, as top-down pose estimation sees people.

Points are in pixel indices: the center of the top left pixel is (0, 0). An affine matrix (2, 3) maps a point of the
file to a point of the crop. The rules are those of mmpose: a box grows until it has the aspect ratio of the crop, and
then fills it. With ``udp`` the centers of the corner pixels meet the edges of the box (Huang, Zhu, Guo, Huang, "The
Devil Is in the Details: Delving into Unbiased Data Processing for Human Pose Estimation", CVPR 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield import _checks

PADDING = 1.25
"""Published factor on the sides of a box."""


def crop_box(boxes: Tensor, size: Sequence[int], padding: float = PADDING) -> tuple[Tensor, Tensor]:
    """Return the center and the sides of the rectangle that a crop shows of each box.

    Args:
        boxes: (..., 4), the edges (left, top, right, bottom) in pixels of the file.
        size: (height, width) of the crop in pixels.
        padding: factor on the sides of the box, before one of them grows to the aspect ratio of the crop.

    Returns:
        ``center`` and ``scale``, (..., 2) float64: x and y, and width and height, in pixels of the file.
    """
    corners = boxes.double().unflatten(-1, (2, 2))
    center = corners.mean(-2)
    return center, with_aspect((corners[..., 1, :] - corners[..., 0, :]) * padding, size)


def with_aspect(scale: Tensor, size: Sequence[int]) -> Tensor:
    """Return sides (..., 2), width and height, one of which has grown to the aspect ratio of ``size``."""
    height, width = size
    aspect = width / height
    wide, tall = scale.unbind(-1)
    return torch.stack([torch.maximum(wide, tall * aspect), torch.maximum(tall, wide / aspect)], -1)


def crop_matrix(
    center: Tensor, scale: Tensor, size: Sequence[int], rotation: Tensor | float = 0.0, *, udp: bool = False
) -> Tensor:
    """Return the affine matrix from pixels of the file to pixels of the crop.

    Args:
        center: (..., 2), x and y of the rectangle's center in pixels of the file.
        scale: (..., 2), its width and height. Without ``udp`` only the width counts.
        size: (height, width) of the crop in pixels.
        rotation: in degrees, a number or (...,). Above 0, the content of the crop turns counterclockwise, and with
            ``udp`` clockwise, as in published code.
        udp: align the centers of the corner pixels with the rectangle's edges.

    Returns:
        (..., 2, 3) float64.

    Raises:
        ValueError: a rectangle has no area.
    """
    center, scale = center.double(), scale.double()
    if not bool((scale > 0).all()):
        raise ValueError(f"scale must be above 0, or there is nothing to see; got {scale.min().item():g}.")
    angle = torch.as_tensor(rotation, dtype=torch.float64, device=center.device) * (math.pi / 180)
    angle = angle.expand(center.shape[:-1])
    sides = center.new_tensor([size[1], size[0]])
    if udp:
        factors, middle = (sides - 1) / scale, (sides - 1) / 2
    else:
        factors, middle = (sides[0] / scale[..., :1]).expand_as(scale), sides / 2
        angle = -angle
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    linear = factors[..., None] * turn
    return torch.cat([linear, middle[..., None] - linear @ center[..., None]], -1)


def mirrored(matrix: Tensor, width: int) -> Tensor:
    """Return matrices (..., 2, 3) for pixels of a mirrored file as matrices for those of the file.

    Args:
        matrix: from pixels of the mirrored file to pixels of the crop.
        width: of the file in pixels.
    """
    turned = matrix.clone()
    turned[..., 0] = -matrix[..., 0]
    turned[..., 2] = matrix[..., 2] + (width - 1) * matrix[..., 0]
    return turned


def apply_matrix(points: Tensor, matrix: Tensor) -> Tensor:
    """Return points (..., N, 2) mapped by affine matrices (..., 2, 3), in the dtype of the points."""
    moved = points.to(matrix.dtype) @ matrix[..., :2].mT + matrix[..., None, :, 2]
    return moved.to(points.dtype)


def inverse(matrix: Tensor) -> Tensor:
    """Return the inverses of affine matrices (..., 2, 3): from pixels of the crop to pixels of the file."""
    linear = torch.linalg.inv(matrix[..., :2])
    return torch.cat([linear, -linear @ matrix[..., 2:]], -1)


def warp(image: Tensor, matrices: Tensor, size: Sequence[int]) -> Tensor:
    """Return crops of an image, sampled bilinearly; outside the image is 0.

    The result is that of OpenCV 5's ``warpAffine``: 8-bit values differ by at most 1, where both round a half. OpenCV 4
    rounds positions to 1/32 of a pixel, which moves values of pure noise by up to 5 of 255.

    Args:
        image: (C, H, W), uint8 or floating point.
        matrices: (M, 2, 3), from pixels of the image to pixels of the crop.
        size: (height, width) of the crops in pixels.

    Returns:
        (M, C, height, width), in the dtype of the image. For uint8, values are rounded.

    Raises:
        ValueError: a shape is wrong.
    """
    if image.ndim != 3:
        raise ValueError(f"image must be (C, H, W); got shape {tuple(image.shape)}.")
    if matrices.ndim != 3 or matrices.shape[1:] != (2, 3):
        raise ValueError(f"matrices must be (M, 2, 3); got shape {tuple(matrices.shape)}.")
    height, width = (_checks.integer("a side of size", side) for side in size)
    back = inverse(matrices.double())
    window = _seen(image, back, (height, width)) if len(back) else None
    if window is None:
        return image.new_zeros(len(back), image.shape[0], height, width)
    part, corner = window
    # grid_sample wants the centers of the first and last pixel at -1 and 1; a single pixel would divide by 0.
    part = F.pad(part, (0, 1, 0, 1)) if 1 in part.shape[1:] else part
    unit = 2 / back.new_tensor([part.shape[2] - 1, part.shape[1] - 1])
    rows = torch.arange(height, dtype=torch.float64, device=back.device)[:, None, None]
    columns = torch.arange(width, dtype=torch.float64, device=back.device)[:, None]
    across, down, offset = (back * unit[:, None]).movedim(2, 0)[:, :, None, None]  # each (M, 1, 1, 2): x and y
    grid = across * columns + (down * rows + offset - back.new_tensor(corner) * unit - 1)
    values = part if part.dtype in (torch.float32, torch.float64) else part.float()
    batch = values.expand(len(back), *values.shape)
    crops = F.grid_sample(batch, grid.to(values), mode="bilinear", padding_mode="zeros", align_corners=True)
    return crops.round().to(image.dtype) if image.dtype == torch.uint8 else crops.to(image.dtype)


def _seen(image: Tensor, back: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]] | None:
    """Return the part of an image (C, H, W) that crops show, and its (left, top); None if they show none of it.

    Args:
        image: (C, H, W).
        back: (M, 2, 3), from pixels of the crops to pixels of the image.
        size: (height, width) of the crops.
    """
    bottom, right = size[0] - 1, size[1] - 1
    ends = back.new_tensor([[0, 0], [right, 0], [0, bottom], [right, bottom]])
    corners = apply_matrix(ends, back)  # affine maps take their extremes at the corners
    low, high = corners.amin((0, 1)).floor(), corners.amax((0, 1)).floor() + 2
    limits = low.new_tensor([image.shape[2], image.shape[1]])
    low, high = torch.minimum(low.clamp(min=0), limits), torch.minimum(high, limits)
    if not bool((high > low).all()):
        return None
    (left, top), (right, bottom) = low.long().tolist(), high.long().tolist()
    return image[:, top:bottom, left:right], (left, top)
