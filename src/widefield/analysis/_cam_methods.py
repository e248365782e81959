"""Weigh a layer's map by how it speaks for a score: the methods of class activation maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Seen(NamedTuple):
    """What a method may look at."""

    found: Tensor
    """(N, C, h, w): the layer's maps."""
    gradient: Callable[[], Tensor]
    """Returns the gradient of the score with respect to them, (N, C, h, w)."""
    images: Tensor
    """(N, C, H, W), or clips (N, C, T, H, W)."""
    score: Callable[[Tensor, Tensor], Tensor]
    """Images (M, ...) and, for each, its place in the batch, int64 (M,) -> scores (M,), without gradients."""


def grad_cam(seen: Seen) -> Tensor:
    """Each channel by the mean of its gradient (Selvaraju et al. 2017, equations 1 and 2)."""
    return (seen.gradient().mean((2, 3), keepdim=True) * seen.found).sum(1).relu()


def hires_cam(seen: Seen) -> Tensor:
    """Position by position by the gradient there (Draelos and Carin 2020, equation 4)."""
    return (seen.gradient() * seen.found).sum(1).relu()


def layer_cam(seen: Seen) -> Tensor:
    """Position by position by the positive part of the gradient (Jiang et al. 2021, equations 5 and 6)."""
    return (seen.gradient().relu() * seen.found).sum(1).relu()


def grad_cam_plus_plus(seen: Seen) -> Tensor:
    """Each channel by its positive gradients, each weighted (Chattopadhay et al. 2018, equations 8 and 19).

    As there, the score is the exponential of the logit, whose derivatives are powers of the logit's gradient times a
    factor for each image that a map does not show.
    """
    gradient = seen.gradient()
    square = gradient**2
    below = 2 * square + (seen.found * gradient**3).sum((2, 3), keepdim=True)
    share = torch.where(below == 0, 0, square / torch.where(below == 0, 1, below))
    weight = (share * gradient.relu()).sum((2, 3), keepdim=True)
    return (weight * seen.found).sum(1).relu()


def eigen_cam(seen: Seen) -> Tensor:
    """The projection on the first principal component of the maps, whatever the class (Muhammad and Yeasin 2020).

    The component's sign, which the paper leaves open, is chosen so that the projection's sum is not negative.
    """
    places = seen.found.flatten(2).transpose(1, 2).double()
    component = torch.linalg.svd(places, full_matrices=False)[2][:, 0]
    projected = (places @ component[..., None])[..., 0]
    projected = projected * torch.where(projected.sum(1, keepdim=True) < 0, -1, 1)
    maps: Tensor = projected.view(len(places), *seen.found.shape[2:]).relu().to(seen.found.dtype)
    return maps


_TOGETHER = 32
"""Images of one pass of Score-CAM."""


def score_cam(seen: Seen) -> Tensor:
    """Each channel by the score of the image seen through it (Wang et al. 2020, algorithm 1).

    The masks are the channels, scaled to [0, 1] at the image's size; the scores of an image's masks are weights by
    softmax over its channels. It takes one forward pass of an image for each channel. A channel that is constant masks
    nothing and has the weight of a black image.
    """
    count, channels = seen.found.shape[:2]
    low, high = seen.found.amin((2, 3), keepdim=True), seen.found.amax((2, 3), keepdim=True)
    masks = (seen.found - low) / torch.where(high > low, high - low, 1)
    every = torch.arange(count * channels, device=seen.found.device)
    scores = []
    for part in every.split(_TOGETHER):
        rows, columns = part // channels, part % channels
        mask = F.interpolate(
            masks[rows, columns][:, None], seen.images.shape[-2:], mode="bilinear", align_corners=False
        )
        mask = mask if seen.images.ndim == 4 else mask[:, :, None]
        scores.append(seen.score(seen.images[rows] * mask, rows))
    weight = torch.cat(scores).view(count, channels).double().softmax(1).to(seen.found.dtype)
    return (weight[..., None, None] * seen.found).sum(1).relu()


METHODS: dict[str, Callable[[Seen], Tensor]] = {
    "grad_cam": grad_cam,
    "grad_cam++": grad_cam_plus_plus,
    "hires_cam": hires_cam,
    "layer_cam": layer_cam,
    "eigen_cam": eigen_cam,
    "score_cam": score_cam,
}
"""Name -> method, which returns maps (N, h, w) that are not negative."""

NAMES = {
    "grad_cam": "Grad-CAM",
    "grad_cam++": "Grad-CAM++",
    "hires_cam": "HiResCAM",
    "layer_cam": "LayerCAM",
    "eigen_cam": "EigenCAM",
    "score_cam": "Score-CAM",
}
"""Name -> as in the papers."""
