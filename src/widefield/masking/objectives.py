"""What a masked image model predicts, and how far it is off: targets and losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield import _checks

TARGETS = ("pixels", "normalized_pixels", "hog")
REPLACEMENTS = ("target", "prediction", "mixed")

_EPS = 1e-6
_CELL = 8
_BINS = 9


def normalized_patches(images: Tensor, patch: int) -> Tensor:
    """Return images in which every patch has mean 0 and variance 1 over its pixels and channels, (N, C, H, W).

    He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, section 3; variances are unbiased and
    1e-6 is added, as published.
    """
    n, channels, height, width = images.shape
    rows, columns = height // patch, width // patch
    patches = images.view(n, channels, rows, patch, columns, patch)
    variance, mean = torch.var_mean(patches, (1, 3, 5), keepdim=True, correction=1)
    return ((patches - mean) / (variance + _EPS).sqrt()).view(images.shape)


def oriented_gradients(images: Tensor) -> Tensor:
    """Return histograms of oriented gradients, (N, C * 9, H / 8, W / 8), as a target.

    Nine bins of unsigned orientation in cells of 8x8 pixels for each channel, voted for by magnitude and shared between
    the two nearest bins; the vector of a cell has length 1. Dalal, Triggs, "Histograms of Oriented Gradients for Human
    Detection", CVPR 2005; as a target: Wei et al., "Masked Feature Prediction for Self-Supervised Visual Pre-Training",
    CVPR 2022, section 3.2.
    """
    n, channels, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    strength = torch.hypot(dx, dy)
    place = torch.atan2(dy, dx).remainder(torch.pi) / torch.pi * _BINS
    low = place.floor()
    share = place - low
    bins = torch.zeros(n, channels, _BINS, height, width, dtype=images.dtype, device=images.device)
    for index, weight in ((low, 1 - share), (low + 1, share)):
        # Not in place, which vmap refuses.
        bins = bins.scatter_add(2, index.long().remainder(_BINS)[:, :, None], (strength * weight)[:, :, None])
    cells = F.avg_pool2d(bins.flatten(1, 2), _CELL)
    cells = cells.unflatten(1, (channels, _BINS))
    return F.normalize(cells, dim=2, eps=_EPS).flatten(1, 2)


@dataclass(frozen=True)
class Target:
    """What is predicted.

    Args:
        kind: "pixels" of the normalized image; "normalized_pixels", also normalized per patch; or "hog".
        patch: side of a patch in pixels.
    """

    kind: str
    patch: int

    def __post_init__(self) -> None:
        _checks.choice("kind", self.kind, TARGETS)
        if self.kind == "hog" and _checks.integer("patch", self.patch) % _CELL:
            raise ValueError(f"cells of {_CELL} pixels do not fill a patch of {self.patch}; use a multiple.")

    @property
    def channels(self) -> int:
        """Return the number of values at each place, for images of three channels."""
        return 3 * _BINS if self.kind == "hog" else 3

    @property
    def step(self) -> int:
        """Return pixels of the image per place."""
        return _CELL if self.kind == "hog" else 1

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, channels, H / step, W / step), without gradients."""
        images = images.detach()
        if self.kind == "hog":
            return oriented_gradients(images)
        return normalized_patches(images, self.patch) if self.kind == "normalized_pixels" else images

    def restored(self, prediction: Tensor, images: Tensor) -> Tensor:
        """Return predicted pixels on the scale of the images, for pictures: (N, 3, H, W).

        Patches get the mean and variance of the image's own, which the prediction leaves open.
        """
        if self.kind != "normalized_pixels":
            return prediction
        n, channels, height, width = images.shape
        shape = n, channels, height // self.patch, self.patch, width // self.patch, self.patch
        variance, mean = torch.var_mean(images.reshape(shape), (1, 3, 5), keepdim=True, correction=1)
        return (prediction.reshape(shape) * (variance + _EPS).sqrt() + mean).view(images.shape)


def _focal_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Weigh the absolute error by ``2 sigmoid(0.2 error) - 1``, with its gradient, as A2MIM's code does."""
    error = (prediction - target).abs()
    return error * (2 * torch.sigmoid(0.2 * error) - 1)


_ERRORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda a, b: (a - b).square(),
    "l1": lambda a, b: (a - b).abs(),
    "focal_l1": _focal_l1,
}
ERRORS = tuple(_ERRORS)


def masked_error(prediction: Tensor, target: Tensor, masked: Tensor, kind: str = "mse", eps: float = 0.0) -> Tensor:
    """Return the mean error at masked places, a scalar.

    Args:
        prediction, target: (N, C, H, W).
        masked: bool (N, H, W).
        kind: one of :data:`ERRORS`.
        eps: added to the number of masked places.
    """
    count = masked.sum() + eps
    return (_ERRORS[kind](prediction, target) * masked[:, None]).sum() / count / target.shape[1]


@dataclass(frozen=True)
class FrequencyLoss:
    """The error of the spectrum: Li et al., "Architecture-Agnostic Masked Image Modeling" (A2MIM), ICML 2023, sec. 4.3.

    Args:
        weight: factor of the loss; 0: it is not computed. Published: 0.5 for ResNet-50 and 0 for deeper networks.
        unmasked: share of the prediction that is kept at visible pixels; the rest is replaced.
        replace: by what: "target", "prediction" (without its gradient), or "mixed", half of each.
        focal: the focal frequency loss (Jiang et al., ICCV 2021) of the batch's mean spectrum; otherwise the mean of
            squares that are each weighted by their own root, as published with ``fft_reweight``.
    """

    weight: float = 0.5
    unmasked: float = 1e-3
    replace: str = "mixed"
    focal: bool = True

    def __post_init__(self) -> None:
        _checks.number("weight", self.weight)
        _checks.number("unmasked", self.unmasked, maximum=1)
        _checks.choice("replace", self.replace, REPLACEMENTS)

    def __call__(self, prediction: Tensor, images: Tensor, masked: Tensor) -> Tensor:
        """Return the loss without its weight, a scalar; arguments as of :func:`masked_error`."""
        own = prediction.detach()
        other = {"target": images, "prediction": own, "mixed": 0.5 * own + 0.5 * images}[self.replace]
        share = masked[:, None].to(prediction.dtype)
        share = share + (1 - share) * self.unmasked
        both = (prediction * share + other * (1 - share), images)
        found, wanted = (torch.fft.fft2(x, norm="ortho") for x in both)
        if not self.focal:
            error: Tensor = (found - wanted).abs()
            return (error.detach() * error).mean()
        distance = torch.view_as_real(found.mean(0) - wanted.mean(0)).square().sum(-1)
        weight = (distance.detach().sqrt() + 1).log()
        weight = (weight / weight.max()).nan_to_num(0.0).clamp(0, 1)
        loss: Tensor = (weight * distance).mean()
        return loss
