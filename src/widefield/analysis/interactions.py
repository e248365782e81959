"""Measure multi-order interactions: the amount of context that two patches of an image need to interact.

The measure is that of Deng, Ren, Zhang and Zhang, "Discovering and explaining the representation bottleneck of DNNs"
(ICLR 2022), used in MogaNet's figures. For n patches, a context S of m others, and the log-odds f of a class,
I(m)(i, j) is the mean over S of f(S+i+j) - f(S+i) - f(S+j) + f(S), and J(m) is the mean of |I(m)| over images and
pairs, divided by its mean over the orders m.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from widefield import _checks, report
from widefield.analysis._model import chunks, track, turned, visited
from widefield.analysis._result import Result
from widefield.analysis._scores import logits
from widefield.surgery.inputs import place

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDERS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
"""Default sizes of the contexts, as shares of the other patches."""

_APART = 3
"""Ratio of the bounds from which more contexts are recommended."""
BASELINES = ("zero", "mean")
_SIGNS = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)  # of f with both patches, with i, with j, with none


@dataclass(frozen=True)
class Interactions(Result):
    """Strength of the interaction between neighboring patches, by the size of the context around them.

    A mean over few contexts is noisy, and the absolute value of noise is positive. The published estimate, the mean of
    ``abs(mean over contexts)``, therefore lies above the true value wherever contexts differ, most of all at middle
    orders; this is ``upper``. ``lower`` multiplies each context's value by the sign of the mean over the other
    contexts, and lies below. On average over draws of contexts, lower <= truth <= upper for any noise. ``strength``
    uses their geometric mean, which is unbiased if interactions and noise are normally distributed around zero. All
    three agree if every context was seen.

    Arrays are float64, (M,) for M orders, unless stated otherwise. Errors are standard errors (jackknife) over images,
    or over pairs for a single image; they include the choice of pairs and contexts, and are NaN for a single pair. J is
    NaN where the interactions do not exceed rounding.
    """

    title: ClassVar[str] = "Multi-order interactions"
    lead: ClassVar[str] = (
        "Strength of the interaction between two neighboring patches, given m of the other patches as context, "
        "relative to its mean over the orders shown. Solid: corrected for the noise of sampled contexts, with a band "
        "of one standard error. Dotted: the published estimate. More contexts are needed where the two differ."
    )

    name: str
    about: Mapping[str, Any]
    variables: int
    """Number of patches n."""
    orders: np.ndarray
    """Sizes m of the contexts, int64, from 0 to n - 2."""
    contexts: np.ndarray
    """Number of contexts averaged per pair, int64; all that exist, if no more than requested."""
    lower: np.ndarray
    """Mean of |I(m)| over images and pairs, in log-odds (natural logarithm): lower bound."""
    upper: np.ndarray
    """The upper bound of the same."""
    strength: np.ndarray
    """J(m) from the geometric mean of ``lower`` and ``upper``."""
    strength_error: np.ndarray
    """Standard error of ``strength``."""
    published: np.ndarray
    """J(m) from ``upper``: the paper's estimate."""
    published_error: np.ndarray
    """Standard error of ``published``."""
    samples: np.ndarray
    """(k, 2, M): the values averaged in ``lower`` and ``upper``, per image, or per pair for a single image."""
    resolution: float
    """Smallest interaction that exceeds rounding of the model's outputs, in log-odds."""

    def rows(self) -> list[dict[str, str]]:
        """Return one row per order."""
        others = self.variables - 2
        return [
            {
                "model": self.name,
                "context": f"{m} of {others}",
                "J": _shown(self.strength[k], self.strength_error[k]),
                "J, published": _shown(self.published[k], self.published_error[k]),
                "mean |I|": f"{self.lower[k]:.2g} to {self.upper[k]:.2g}",
            }
            for k, m in enumerate(self.orders)
        ]

    @classmethod
    def reading(cls, results: Mapping[str, Interactions]) -> str:
        """Return with how much context patches interact the most and the least, and what the sampling leaves open."""
        return " ".join(_read(name, result) for name, result in results.items())

    @classmethod
    @report.paper()
    def draw(cls, results: Mapping[str, Interactions], **options: Any) -> Figure:
        """Draw J against the share of the other patches in the context, one line per model; takes no options."""
        if options:
            raise TypeError(f"the figure of interactions takes no options; got {sorted(options)}.")
        labels = [textwrap.fill(name, 50) for name in results]
        figure = report.blank(report.COLUMN, 2.2 + 0.14 * sum(label.count("\n") + 1 for label in labels))
        axis = figure.subplots()
        axis.axhline(1, color="0.8", linewidth=0.6)
        for k, (label, result) in enumerate(zip(labels, results.values(), strict=True)):
            color, marker = report.COLORS[k % len(report.COLORS)], report.MARKERS[k % len(report.MARKERS)]
            share = result.orders / (result.variables - 2)
            axis.plot(share, result.strength, color=color, marker=marker, label=label)
            axis.plot(share, result.published, color=color, linewidth=0.9, linestyle=":")
            low, high = result.strength - result.strength_error, result.strength + result.strength_error
            axis.fill_between(share, low, high, color=color, alpha=0.2, linewidth=0)
        axis.set_xlim(-0.02, 1.02)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("order $m\\,/\\,(n-2)$")
        axis.set_ylabel("interaction strength $J^{(m)}$")
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center")
        return figure


def _shown(value: float, error: float) -> str:
    if not np.isfinite(value):
        return "within rounding"
    return f"{value:.2f} ± {error:.2f}" if np.isfinite(error) else f"{value:.2f}"


def _read(name: str, result: Interactions) -> str:
    """Return what the interactions of a model show."""
    known = np.isfinite(result.strength)
    if not known.any():
        return f"{name}: no interaction between two patches exceeds the rounding of the model's outputs."
    if len(result.orders) == 1:
        return f"{name}: one size of context says nothing about the others: J is 1 there by definition."
    least, most = int(np.argmin(result.strength)), int(np.argmax(result.strength))
    high, low = (_shown(result.strength[k], result.strength_error[k]) for k in (most, least))
    words = (
        f"{name}: two patches interact the most with {_context(result, most)} (J {high}), and the least with "
        f"{_context(result, least)} (J {low})."
    )
    error = math.hypot(result.strength_error[most], result.strength_error[least])
    if not np.isfinite(error):
        words += " One pair of patches gives no error: the order may be chance."
    elif result.strength[most] - result.strength[least] <= 2 * error:
        words += " The two differ by no more than twice their error, so this may be chance."
    apart = int((np.maximum(result.lower, 0) * _APART < result.upper).sum())
    if apart:
        words += (
            f" For {apart} of {len(result.orders)} sizes of context the bounds of |I| are more than {_APART} times "
            "apart: more contexts would narrow them."
        )
    return words


def _context(result: Interactions, index: int) -> str:
    """Return a size of contexts as text."""
    order, others = int(result.orders[index]), result.variables - 2
    if order in (0, others):
        return f"{'all' if order else 'none of the'} {others} other patches as context"
    return f"{order} of {others} other patches as context"


@dataclass(frozen=True)
class _Plan:
    """The pairs, orders and contexts examined in every image."""

    grid: int
    pairs: np.ndarray
    """Pairs to choose from, (Q, 2)."""
    wanted: int
    """Number of pairs per image."""
    orders: tuple[int, ...]
    contexts: int
    counts: tuple[int, ...]
    """Number of contexts of each order."""

    @property
    def others(self) -> int:
        return self.grid**2 - 2

    def complete(self, order: int) -> bool:
        """Return whether all contexts of this size are seen."""
        return math.comb(self.others, order) <= self.contexts

    def passes(self, images: int) -> int:
        return images * (1 + 4 * self.wanted * sum(self.counts))

    def masks(self, i: int, j: int, rng: np.random.Generator) -> Tensor:
        """Return the patches shown, bool (contexts of all orders, 4, n): with i and j, i alone, j alone, neither."""
        shown = [
            _every(self.others, order) if self.complete(order) else _some(self.others, order, self.contexts, rng)
            for order in self.orders
        ]
        masks = np.zeros((sum(self.counts), 4, self.grid**2), dtype=bool)
        masks[:, :, np.delete(np.arange(self.grid**2), [i, j])] = np.concatenate(shown)[:, None]
        masks[:, :2, i] = True
        masks[:, ::2, j] = True
        return torch.from_numpy(masks)


def _plan(grid: int, orders: Sequence[float], pairs: int, contexts: int, reach: int | None) -> _Plan:
    grid = _checks.integer("grid", grid, minimum=2, maximum=32)  # all pairs of patches are tabulated
    pairs = _checks.integer("pairs", pairs)
    contexts = _checks.integer("contexts", contexts, minimum=2)  # the sign comes from other contexts
    reach = grid if reach is None else _checks.integer("reach", reach)
    if not len(orders):
        raise ValueError(f"orders must be shares of the other patches, such as (0, 0.5, 1); got {orders!r}.")
    shares = [_checks.number("every entry of orders", share, maximum=1) for share in orders]
    sizes = tuple(sorted({round(share * (grid**2 - 2)) for share in shares}))
    rows, columns = np.divmod(np.arange(grid**2), grid)
    distance = np.maximum(abs(rows[:, None] - rows), abs(columns[:, None] - columns))
    near = np.argwhere(np.triu(distance <= reach, 1))
    counts = tuple(min(math.comb(grid**2 - 2, size), contexts) for size in sizes)
    return _Plan(grid, near, min(pairs, len(near)), sizes, contexts, counts)


def _some(others: int, order: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return independent contexts of one size, bool (count, others)."""
    shown: np.ndarray = rng.random((count, others)).argsort(1) < order
    return shown


def _every(others: int, order: int) -> np.ndarray:
    """Return all contexts of one size, bool (count, others)."""
    chosen = np.array(list(itertools.combinations(range(others), order)), dtype=np.int64)
    shown = np.zeros((len(chosen), others), dtype=bool)
    np.put_along_axis(shown, chosen, True, axis=1)
    return shown


def forward_passes(
    images: int,
    *,
    grid: int = 16,
    orders: Sequence[float] = ORDERS,
    pairs: int = 8,
    contexts: int = 16,
    reach: int | None = 2,
) -> int:
    """Return the number of images that the model processes in :func:`interactions` with these arguments.

    Raises ValueError or TypeError as that function does.
    """
    return _plan(grid, orders, pairs, contexts, reach).passes(_checks.integer("images", images))


@_checks.guided
def interactions(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    targets: Sequence[int] | Tensor | None = None,
    grid: int = 16,
    orders: Sequence[float] = ORDERS,
    pairs: int = 8,
    contexts: int = 16,
    reach: int | None = 2,
    baseline: str = "zero",
    seed: int = 0,
    batch_size: int = 64,
    name: str | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Interactions:
    """Measure the multi-order interaction strength J(m) of a classifier, with its sampling error.

    The defaults suit a first look. Raise ``pairs`` for a smaller error, and ``contexts`` until ``lower`` and ``upper``
    meet. The paper used 50 images, 200 pairs and 100 contexts, four million forward passes per order;
    :func:`forward_passes` returns yours. Contexts are drawn uniformly among those of their size; if no more exist than
    requested, each is seen once. Pairs are drawn uniformly among those within reach, anew for every image, and used for
    all orders. J is relative to the mean over the requested orders, as in the paper, so compare models over the same
    orders.

    Args:
        model: maps images (N, C, H, W) to logits (N, classes), or (N, 1) for a binary classifier.
        images: normalized images, a tensor or batches.
        targets: class whose log-odds log(p / (1 - p)) are explained, one per image. Default: the class that the model
            predicts for the whole image.
        grid: patches along each side, from 2 to 32; n = grid * grid. Patches differ in size if the grid does not divide
            the image.
        orders: sizes of contexts as shares of the n - 2 other patches; rounded, duplicates removed.
        pairs: pairs per image.
        contexts: contexts per pair and order, at least 2.
        reach: largest distance between the patches of a pair, in patches along each axis (the paper: 2); None: any.
        baseline: color of hidden patches. ``"zero"``: 0, which is the data set's mean for normalized images, as in the
            paper. ``"mean"``: each image's own mean.
        seed: of pairs and contexts. An image's draws depend only on the seed and the image's index.
        batch_size: largest number of images in a forward pass.
        name: the model's name in tables and figures. Default: its class name.
        about: facts to store with the result.
        progress: show a progress bar.

    Raises:
        ValueError, TypeError: an argument is out of range; images are smaller than the grid; the model returns no
            logits; targets do not match.
    """
    plan = _plan(grid, orders, pairs, contexts, reach)
    _checks.choice("baseline", baseline, BASELINES)
    batch_size = _checks.integer("batch_size", batch_size)
    seed = _checks.integer("seed", seed, minimum=0)
    given = targets.tolist() if isinstance(targets, Tensor) else targets
    classes = None if given is None else [_checks.integer("every target", target, minimum=0) for target in given]
    count = len(images) if isinstance(images, Tensor) else None
    if classes is not None and count is not None:
        _fit(classes, count)
    tasks = _tasks(model, images, plan, classes, seed, batch_size)
    total = None if count is None else count * plan.wanted
    found: list[list[np.ndarray]] = []
    largest, eps = 0.0, torch.finfo(place(model)[1]).eps
    with visited(model), torch.no_grad():
        shown = track(tasks, "interactions", total=total, show=progress)
        for index, odds in _in_full_batches(model, shown, _Shown(plan.grid, baseline), batch_size):
            largest = max(largest, odds.abs().max().item())
            if index == len(found):
                found.append([])
            found[-1].append(_bounds((odds @ _SIGNS).numpy(), plan))
    if classes is not None:
        _fit(classes, len(found))
    bounds = np.array(found)  # (N, pairs, 2, M)
    resolution = 2 * eps * largest  # of a sum of four rounded values
    samples = bounds.mean(1) if len(bounds) > 1 else bounds[0]
    (strength, published), (strength_error, published_error) = _relative(samples, resolution)
    lower, upper = samples.mean(0)
    return Interactions(
        name=type(model).__name__ if name is None else name,
        about={
            **(about or {}),
            "images": len(found),
            "class": "predicted" if classes is None else "given",
            "grid": plan.grid,
            "pairs": plan.wanted,
            "contexts": plan.contexts,
            "reach": "any" if reach is None else reach,
            "baseline": baseline,
            "seed": seed,
            "forward passes": plan.passes(len(found)),
        },
        variables=plan.grid**2,
        orders=np.array(plan.orders),
        contexts=np.array(plan.counts),
        lower=lower,
        upper=upper,
        strength=strength,
        strength_error=strength_error,
        published=published,
        published_error=published_error,
        samples=samples,
        resolution=resolution,
    )


def _tasks(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    plan: _Plan,
    classes: Sequence[int] | None,
    seed: int,
    batch_size: int,
) -> Iterator[tuple[int, Tensor, int, Tensor]]:
    """Yield (index of the image, image, class, masks) for every pair of every image."""
    index = 0
    for part in chunks(images, model, batch_size):
        if min(part.shape[2:]) < plan.grid:
            raise ValueError(
                f"images of {part.shape[2]}x{part.shape[3]} pixels have no {plan.grid}x{plan.grid} patches: "
                f"give a grid of at most {min(part.shape[2:])}.{turned(model, part.shape)}"
            )
        for image, whole in zip(part, logits(model, part), strict=True):
            if classes is not None and index >= len(classes):
                raise ValueError(f"targets must hold one class per image: there are {len(classes)}, and more images.")
            target = int(whole.argmax()) if classes is None else classes[index]
            if target >= len(whole):
                raise ValueError(f"targets must be below {len(whole)}, the model's outputs; got {target}.")
            rng = np.random.default_rng((seed, index))
            chosen = rng.choice(len(plan.pairs), plan.wanted, replace=False)
            for i, j in plan.pairs[np.sort(chosen)].tolist():
                yield index, image, target, plan.masks(i, j, rng)
            index += 1


def _fit(classes: Sequence[int], images: int) -> None:
    if len(classes) != images:
        raise ValueError(f"targets must hold one class per image; got {len(classes)} for {images} images.")


class _Shown:
    """Images with some of their patches; the others are replaced by the baseline."""

    def __init__(self, grid: int, baseline: str) -> None:
        self.grid, self.baseline = grid, baseline

    def __call__(self, image: Tensor, masks: Tensor) -> Tensor:
        """Return images (N, C, H, W) for an image (C, H, W) and masks, bool (N, n)."""
        hidden = image.mean((1, 2), keepdim=True) if self.baseline == "mean" else image.new_zeros(())
        rows, columns = (torch.arange(side, device=image.device) * self.grid // side for side in image.shape[1:])
        patches = masks.to(image.device).view(-1, 1, self.grid, self.grid)
        return torch.where(patches[:, :, rows][:, :, :, columns], image, hidden)


@dataclass
class _Pair:
    """A pair of patches whose masked images wait for the model, or have been through it."""

    index: int
    """That of the image."""
    target: int
    waiting: int
    odds: list[Tensor] = field(default_factory=list)


def _in_full_batches(
    model: nn.Module, tasks: Iterable[tuple[int, Tensor, int, Tensor]], shown: _Shown, size: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the image, log-odds (contexts, 4)) for every task, in order; batches are filled across tasks."""
    pairs: deque[_Pair] = deque()
    parts: list[tuple[_Pair, Tensor]] = []
    for index, image, target, masks in tasks:
        rest = masks.flatten(0, 1)
        pairs.append(_Pair(index, target, len(rest)))
        if parts and parts[0][1].shape[1:] != image.shape:  # images of another size cannot share a batch
            _run(model, parts)
        while len(rest):
            room = size - sum(len(images) for _, images in parts)
            parts.append((pairs[-1], shown(image, rest[:room])))
            rest = rest[room:]
            if room <= len(parts[-1][1]):
                _run(model, parts)
        while pairs and not pairs[0].waiting:
            yield pairs[0].index, torch.cat(pairs.popleft().odds).view(-1, 4)
    if parts:
        _run(model, parts)
    yield from ((pair.index, torch.cat(pair.odds).view(-1, 4)) for pair in pairs)


def _run(model: nn.Module, parts: list[tuple[_Pair, Tensor]]) -> None:
    """Run the model on masked images, give the log-odds to their pairs, and empty the list."""
    scores = logits(model, torch.cat([images for _, images in parts]))
    for (pair, images), found in zip(parts, scores.split([len(images) for _, images in parts]), strict=True):
        pair.odds.append(_log_odds(found, pair.target))
        pair.waiting -= len(images)
    parts.clear()


def _log_odds(scores: Tensor, target: int) -> Tensor:
    """Return log(p / (1 - p)) of a class, float64 (N,) on the CPU, from logits (N, classes)."""
    scores = scores.double()
    value = scores[:, target]
    if scores.shape[1] > 1:
        rest = torch.cat([scores[:, :target], scores[:, target + 1 :]], 1)
        value = value - rest.logsumexp(1)
    if not value.isfinite().all():
        raise ValueError("the model's logits are not finite for some of the masked images.")
    return value.cpu()


def _bounds(deltas: np.ndarray, plan: _Plan) -> np.ndarray:
    """Return lower and upper bound of |I| for one pair, (2, M), from the values of all contexts."""
    bounds = np.empty((2, len(plan.orders)))
    for k, (order, values) in enumerate(zip(plan.orders, np.split(deltas, np.cumsum(plan.counts)[:-1]), strict=True)):
        bounds[:, k] = abs(values.mean())
        if not plan.complete(order):
            # E[sign(others) * value] = E[sign(others)] * I <= |I|, as a value does not affect its own sign.
            bounds[0, k] = (np.sign(values.sum() - values) * values).mean()
    return bounds


def _relative(samples: np.ndarray, resolution: float) -> tuple[np.ndarray, np.ndarray]:
    """Return J by both estimates, and their standard errors, each (2, M), from samples (k, 2, M) of the bounds."""

    def both(bounds: np.ndarray) -> np.ndarray:
        lower, upper = np.maximum(bounds, 0)
        return np.stack([np.sqrt(lower * upper), upper])

    def ratios(bounds: np.ndarray) -> np.ndarray:
        values = both(bounds)
        ratios: np.ndarray = values / np.maximum(values.mean(1, keepdims=True), np.finfo(float).tiny)
        return ratios

    count, total = len(samples), samples.sum(0)
    some = both(total / count).mean(1) > resolution
    shares = np.where(some[:, None], ratios(total / count), np.nan)
    if count == 1:
        return shares, np.full_like(shares, np.nan)
    without = np.array([ratios((total - sample) / (count - 1)) for sample in samples])
    return shares, np.where(some[:, None], without.std(0) * math.sqrt(count - 1), np.nan)
