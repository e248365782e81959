"""Compute statistics of the routing weights of one mixture.

All of them are functions of the weights (N, n) of N images and n experts, and of the images' classes. Weights do not
reflect the magnitude of the kernels that they multiply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from widefield import _checks
from widefield.analysis._result import plain
from widefield.ops.fold import effective_size

DEAD = 0.01
"""An expert is dead if its share of the routing weight is below this fraction of an even share (1/n)."""

CONSTANT = 1e-3
"""A router is constant if its weights vary over images by less than this fraction of their size: the mixture would
compute the same, to that precision, with fixed weights.
"""

_ROUNDING = 1e-6
"""Smaller variations are rounding errors."""


@dataclass(frozen=True)
class Variance:
    """Variance of routing weights over labeled images, summed over the experts and split by class.

    Attributes:
        within: mean squared distance of an image's weights from the mean of its class.
        between: mean squared distance of class means from the overall mean; both add up to the variance.
        eta_squared: between / (within + between): the share explained by the class; (C - 1) / (N - 1) by chance.
        f: ratio of both per degree of freedom, (between / (C - 1)) / (within / (N - C)); 1 by chance.

    The last two are NaN if the weights vary by rounding only, or with fewer than two classes or no more images than
    classes. All are NaN without labels.
    """

    within: float
    between: float
    eta_squared: float
    f: float


@dataclass(frozen=True)
class Routing:
    """Routing weights of one mixture over a set of images."""

    name: str
    """Module name in the model."""
    kernels: tuple[tuple[int, int], ...]
    """(kernel size, dilation) of each expert."""
    weights: np.ndarray
    """(N, n), float32; exactly 0 where hard routing did not choose the expert."""
    hard: bool

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts: "7x7", "3x3 d2" with a dilation, "7x7 #2" for the second of a kind."""
        plain_names = [f"{size}x{size}" + (f" d{dilation}" if dilation > 1 else "") for size, dilation in self.kernels]
        counts = [plain_names[: i + 1].count(name) for i, name in enumerate(plain_names)]
        return tuple(name + (f" #{k}" if k > 1 else "") for name, k in zip(plain_names, counts, strict=True))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Pixels of the mixture's input that each expert spans, along a side."""
        return tuple(effective_size(size, dilation) for size, dilation in self.kernels)

    def row(self) -> dict[str, str]:
        """Return the row of a table: the mean weight of each expert, and how often it is chosen."""
        named = [*zip(self.experts, self.mean(), self.frequencies(), strict=True)]
        return {
            "mixture": self.name,
            "images": str(len(self.weights)),
            "routing": "hard" if self.hard else "soft",
            "mean weight": ", ".join(f"{name} {mean:.2f}" for name, mean, _ in named),
            "chosen, %": ", ".join(f"{name} {100 * share:.0f}" for name, _, share in named),
        }

    def of(self, images: np.ndarray) -> Routing:
        """Return the routing of some of the images, given by index."""
        return replace(self, weights=self.weights[images])

    def chosen(self) -> np.ndarray:
        """Return the experts chosen by each image, (N, n).

        Hard routing: 1 for every expert with a weight. Soft routing: 1 for the expert with the largest absolute weight;
        ties share the 1.
        """
        size = np.abs(self.weights)
        if self.hard:
            return np.asarray(size > 0, dtype=np.float64)
        best = size == size.max(1, keepdims=True)
        return np.asarray(best / best.sum(1, keepdims=True))

    def frequencies(self) -> np.ndarray:
        """Return each expert's share of all choices, (n,); see :meth:`chosen`."""
        count = self.chosen().sum(0)
        return np.asarray(count / max(count.sum(), 1))

    def use(self) -> np.ndarray:
        """Return each image's routing weights as shares, (N, n): |w_r| / sum_s |w_s|; rows sum to 1.

        Absolute values are used because unnormalized soft weights may be negative. An image whose weights are all 0
        counts as 1/n for each expert.
        """
        size = np.abs(self.weights.astype(np.float64))
        total = size.sum(1, keepdims=True)
        even = np.full_like(size, 1 / size.shape[1])
        return np.asarray(np.divide(size, total, out=even, where=total != 0))

    def shares(self) -> np.ndarray:
        """Return each expert's mean share of the routing weight, (n,), summing to 1.

        A multiple of the "importance" in Shazeer et al. 2017. Entropy, Gini and dead experts are computed from it.
        """
        return _mean(self.use())

    def mean(self) -> np.ndarray:
        """Return the mean routing weight of each expert, (n,)."""
        return _mean(self.weights.astype(np.float64))

    def std(self) -> np.ndarray:
        """Return the standard deviation of each expert's weight over the images, (n,)."""
        return np.asarray(np.sqrt(_mean(np.square(self.weights - self.mean()))))

    def entropy(self) -> float:
        """Return the entropy of the shares, relative to even shares: 1 is even use, 0 is a single expert."""
        shares = self.shares()
        if len(shares) == 1:
            return 1.0
        return float(-(shares * np.log(np.where(shares > 0, shares, 1.0))).sum() / np.log(len(shares)))

    def gini(self) -> float:
        """Return the Gini coefficient of the shares: 0 is even use, 1 - 1/n is a single expert."""
        shares = self.shares()
        return float(np.abs(shares[:, None] - shares).sum() / (2 * len(shares)))

    def dead(self) -> tuple[str, ...]:
        """Return the experts whose share is below ``DEAD / n``.

        With hard routing, these experts are never chosen, or so rarely or weakly that it makes no difference. A soft
        expert that is never preferred may be alive.
        """
        limit = DEAD / len(self.kernels)
        return tuple(name for name, share in zip(self.experts, self.shares(), strict=True) if share < limit)

    def fields(self) -> np.ndarray:
        """Return the field size that each image prefers, (N,), in pixels of the mixture's input, rounded to six
        decimals.

        It is the average of the experts' sizes (:attr:`sizes`), weighted by the image's shares (:meth:`use`).
        """
        return np.asarray((self.use() @ np.asarray(self.sizes, dtype=np.float64)).round(6))

    def extremes(self, count: int = 5) -> tuple[np.ndarray, np.ndarray]:
        """Return the images that prefer the smallest and the largest field, the extreme first.

        Indices, at most ``count`` each; ties keep the order of the images.
        """
        fields = self.fields()
        count = _checks.integer("count", count)
        return fields.argsort(kind="stable")[:count], (-fields).argsort(kind="stable")[:count]

    def variation(self) -> float:
        """Return how much the weights vary over images, from 0 to 1; NaN for fewer than two images.

        The root mean squared distance of the weights from their mean, divided by their root mean square.
        """
        if len(self.weights) < 2:
            return float("nan")
        size = np.square(self.weights.astype(np.float64)).sum(1).mean()
        return float(np.sqrt(np.square(self.std()).sum() / size)) if size else 0.0

    @property
    def depends_on_input(self) -> bool:
        """Whether the router distinguishes these images: its weights vary by ``CONSTANT`` or more.

        True for a single image, which cannot tell.
        """
        return not self.variation() < CONSTANT

    def variance(self, labels: np.ndarray) -> Variance:
        """Split the variance of the weights by class.

        Args:
            labels: class of each image, (N,) integers; images with a negative label are left out.
        """
        known = self.of(np.flatnonzero(labels >= 0))
        weights, labels = known.weights.astype(np.float64), labels[labels >= 0]
        classes, members = np.unique(labels, return_inverse=True)
        n, c = len(weights), len(classes)
        if not n:
            return Variance(*[float("nan")] * 4)
        means = np.stack([weights[members == k].mean(0) for k in range(c)])[members]
        within = float(np.square(weights - means).sum(1).mean())
        between = float(np.square(means - weights.mean(0)).sum(1).mean())
        if not 1 < c < n or known.variation() < _ROUNDING:
            return Variance(within, between, float("nan"), float("nan"))
        f = (between / (c - 1)) / (within / (n - c)) if within else float("inf")
        return Variance(within, between, between / (within + between), f)

    def to_dict(self) -> dict[str, Any]:
        """Return the summary, without the weights of each image."""
        found: dict[str, Any] = plain(
            {
                "block": self.name,
                "hard": self.hard,
                "experts": self.experts,
                "sizes": self.sizes,
                "frequencies": self.frequencies(),
                "shares": self.shares(),
                "mean_weights": self.mean(),
                "std_weights": self.std(),
                "entropy": self.entropy(),
                "gini": self.gini(),
                "dead": self.dead(),
                "field": self.fields().mean(),
                "variation": self.variation(),
                "depends_on_input": self.depends_on_input,
            }
        )
        return found


@dataclass(frozen=True)
class RoutedImages:
    """Routing of a set of images through every mixture of a model.

    Attributes:
        name: the model's name in tables and figures.
        about: how the images came about.
        blocks: one entry per mixture, in the order of the modules.
        labels: class of each image, (N,) int64, an index into ``classes``; -1 if unknown.
        classes: class names.
        names: name of each image.
    """

    name: str
    about: Mapping[str, Any]
    blocks: tuple[Routing, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    names: tuple[str, ...]

    def by_class(self) -> dict[str, Self]:
        """Return the routing of each class that has images, by class name."""
        members = {name: np.flatnonzero(self.labels == i) for i, name in enumerate(self.classes)}
        return {name: self.of(images) for name, images in members.items() if len(images)}

    def of(self, images: np.ndarray) -> Self:
        """Return the routing of some of the images, given by index."""
        return replace(
            self,
            about={**self.about, "images": len(images), "labeled": int((self.labels[images] >= 0).sum())},
            blocks=tuple(block.of(images) for block in self.blocks),
            labels=self.labels[images],
            names=tuple(self.names[k] for k in images),
        )


def block_names(blocks: Sequence[Routing]) -> list[str]:
    """Return the names of blocks without what all end in: "stages.2.blocks.0" for "stages.2.blocks.0.conv_dw"."""
    names = [block.name.split(".") for block in blocks]
    while len(names) > 1 and min(map(len, names)) > 1 and len({parts[-1] for parts in names}) == 1:
        names = [parts[:-1] for parts in names]
    return [".".join(parts) for parts in names]


def collapse(blocks: Sequence[Routing]) -> list[str]:
    """Return a sentence for each of a model's blocks with dead experts or a router that ignores its input."""
    sentences = []
    for name, block in zip(block_names(blocks), blocks, strict=True):
        dead = block.dead()
        faults = [f"hardly uses {', '.join(dead)}"] if dead else []
        if not block.depends_on_input:
            faults.append("gives all images the same weights")
        if faults:
            sentences.append(f"{name} {' and '.join(faults)}")
    return sentences


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of each column; zeros if there are no rows."""
    return np.asarray(values.sum(0) / max(len(values), 1))
