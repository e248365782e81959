"""Choose the kernel sizes: an additive model of the readings, the exact Pareto front of loss and cost, and the choice.

A reading is the loss of the probed network at one assignment of sizes. The additive model says what each group's size
adds to the loss. Its front proposes assignments, which are then read, too: the choice is always made among assignments
whose loss was measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from widefield._intervals import Interval, equality, paired
from widefield.fitting.groups import Assignment, Groups

Table = Mapping[str, Mapping[int, float]]
"""Group -> size -> number."""

_SAME_COST = 0.01
"""Costs that differ by less, relative to the unchanged network, are equal: latency is not measured better."""
_RELATIVE, _OF_WHAT_WAS_LEARNED = 0.02, 0.01
"""A difference of losses counts if it is at least 2 % of the best loss, and 1 % of what training took off the loss of a
network that has not looked at images. A smaller one, although measurable, is less than another seed would change."""
_PROPOSED, _PROMISING = 8, 4
"""Numbers of assignments that are read in full: of the front, and of the best in the first readings."""
_DIGITS = 12
"""Decimals of relative costs."""
_POINTS = 200_000
"""Most points of a front."""


def key_of(assignment: Assignment, groups: Groups) -> tuple[int, ...]:
    """Return the sizes of an assignment in the order of the groups."""
    return tuple(assignment[group.name] for group in groups)


def assignment_of(key: Sequence[int], groups: Groups) -> dict[str, int]:
    """Return the assignment with these sizes, in the order of the groups."""
    return {group.name: int(size) for group, size in zip(groups, key, strict=True)}


def first_readings(groups: Groups, count: int, seed: int) -> list[tuple[int, ...]]:
    """Return the assignments to read first, without repetition.

    These are the unchanged one, those of one size, and those that differ from the unchanged one in one group. Random
    ones fill up to ``count``; if there are no more than ``count`` assignments, all are read.
    """
    unchanged = key_of(groups.unchanged, groups)
    found = dict.fromkeys([unchanged, *(key_of(groups.uniform(size), groups) for size in groups.sizes)])
    for place, group in enumerate(groups):
        for size in group.sizes:
            found.setdefault((*unchanged[:place], size, *unchanged[place + 1 :]))
    options = [group.sizes for group in groups]
    total = math.prod(map(len, options))
    if total <= count:
        return list(dict.fromkeys([*found, *itertools.product(*options)]))
    generator = np.random.default_rng((seed, 7))
    while len(found) < min(count, total):
        found.setdefault(tuple(int(generator.choice(sizes)) for sizes in options))
    return list(found)


@dataclass(frozen=True)
class Additive:
    """Loss as a sum over groups.

    Attributes:
        unchanged: predicted loss of the unchanged assignment.
        effects: group -> size -> change of the loss against the group's own size.
        explained: share of the variance of the readings that the sum explains; 1 if they do not vary.
        error: root mean square of the residuals.
    """

    unchanged: float
    effects: Table
    explained: float
    error: float

    def of(self, assignment: Assignment) -> float:
        """Return the predicted loss of an assignment."""
        return self.unchanged + sum(self.effects[name][size] for name, size in assignment.items())


def additive(readings: Mapping[tuple[int, ...], float], groups: Groups) -> Additive:
    """Fit the additive model by least squares.

    Args:
        readings: sizes in the order of the groups -> mean loss.
        groups: of the network.
    """
    columns = [(place, size) for place, group in enumerate(groups) for size in group.sizes if size != group.own]
    keys = list(readings)
    design = np.array([[1.0, *(float(key[place] == size) for place, size in columns)] for key in keys])
    losses = np.array([readings[key] for key in keys])
    solution = np.linalg.lstsq(design, losses, rcond=None)[0]
    residuals = losses - design @ solution
    variance = float(((losses - losses.mean()) ** 2).sum())
    found = dict(zip(columns, solution[1:].tolist(), strict=True))
    effects = {
        group.name: {size: found.get((place, size), 0.0) for size in group.sizes} for place, group in enumerate(groups)
    }
    explained = 1 - float((residuals**2).sum()) / variance if variance > 0 else 1.0
    return Additive(float(solution[0]), effects, explained, float(np.sqrt((residuals**2).mean())))


@dataclass(frozen=True)
class Point:
    """An assignment on the Pareto front."""

    sizes: tuple[int, ...]
    """In the order of the groups."""
    cost: float
    """Relative to the unchanged network."""
    loss: float
    """Predicted."""


def pareto_front(losses: Table, costs: Table) -> list[tuple[tuple[int, ...], float, float]]:
    """Return all Pareto-optimal choices of one size per group, the cheapest first.

    Both numbers add up over the groups. The groups are added one by one, and dominated sums are dropped, which is exact
    (Nemhauser and Ullmann, "Discrete dynamic programming and capital allocation", Management Science 15, 1969). Of
    equal sums one is kept.

    Args:
        losses: group -> size -> loss.
        costs: the same groups and sizes -> cost, to 12 decimals.

    Returns:
        (sizes in the order of the groups, cost, loss); costs ascend and losses descend.

    Raises:
        ValueError: the front has more points than memory should hold.
    """
    cost, loss = np.zeros(1), np.zeros(1)
    taken: list[tuple[NDArray[np.int64], NDArray[np.int64], list[int]]] = []
    for name, row in losses.items():
        sizes = list(row)
        step_cost = np.array([costs[name][size] for size in sizes])
        step_loss = np.array([row[size] for size in sizes])
        # Sums in another order differ by rounding, and would be further points.
        all_cost = (cost[:, None] + step_cost).ravel().round(_DIGITS)
        all_loss = (loss[:, None] + step_loss).ravel()
        kept = _undominated(all_cost, all_loss)
        if len(kept) > _POINTS:
            raise ValueError(
                f"the Pareto front has more than {_POINTS:,} points: choose sizes by stage, or fewer kernel_sizes."
            )
        cost, loss = all_cost[kept], all_loss[kept]
        taken.append((kept // len(sizes), kept % len(sizes), sizes))
    return [(_trace(taken, place), float(cost[place]), float(loss[place])) for place in range(len(cost))]


def _undominated(cost: NDArray[np.float64], loss: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the indices of the undominated points, the cheapest first."""
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(loss[order])
    better = np.concatenate([[True], loss[order][1:] < best[:-1]])
    kept: NDArray[np.int64] = order[better]
    return kept


def _trace(taken: Sequence[tuple[NDArray[np.int64], NDArray[np.int64], list[int]]], place: int) -> tuple[int, ...]:
    found: list[int] = []
    for parents, options, sizes in reversed(taken):
        found.append(sizes[int(options[place])])
        place = int(parents[place])
    return tuple(reversed(found))


def relative_costs(table: Table, unchanged: float, groups: Groups) -> Table:
    """Return what each size costs more than the group's own, relative to the whole unchanged network."""
    return {
        group.name: {size: (table[group.name][size] - table[group.name][group.own]) / unchanged for size in group.sizes}
        for group in groups
    }


def front(model: Additive, costs: Table, groups: Groups) -> list[Point]:
    """Return the Pareto front of predicted loss and relative cost; ``costs`` as of :func:`relative_costs`."""
    found = pareto_front({group.name: model.effects[group.name] for group in groups}, costs)
    return [Point(sizes, 1 + cost, model.unchanged + loss) for sizes, cost, loss in found]


def finalists(
    points: Sequence[Point],
    readings: Mapping[tuple[int, ...], float],
    groups: Groups,
    limit: float | None,
    costs: Table,
) -> list[tuple[int, ...]]:
    """Return the assignments to read on all images of the selection half.

    These are the unchanged one, those of one size, points of the front within the limit, evenly from the cheapest to
    the best, and the best readings within the limit.
    """
    within = [point for point in points if limit is None or point.cost <= limit + 1e-9]
    places = np.linspace(0, len(within) - 1, min(_PROPOSED, len(within))).round().astype(int).tolist()
    promising = sorted(
        (key for key in readings if fits(key, groups, limit, costs)), key=lambda key: (readings[key], key)
    )
    chosen = [
        key_of(groups.unchanged, groups),
        *(key_of(groups.uniform(size), groups) for size in groups.sizes),
        *(within[place].sizes for place in places),
        *promising[:_PROMISING],
    ]
    return list(dict.fromkeys(chosen))


def cost_of(key: Sequence[int], groups: Groups, costs: Table) -> float:
    """Return the cost of an assignment relative to the unchanged network; ``costs`` as of :func:`relative_costs`."""
    return 1 + sum(costs[group.name][size] for group, size in zip(groups, key, strict=True))


def fits(key: Sequence[int], groups: Groups, limit: float | None, costs: Table) -> bool:
    """Return whether an assignment is within the limit."""
    return limit is None or cost_of(key, groups, costs) <= limit + 1e-9


def check_limit(limit: float | None, costs: Table) -> None:
    """Raise ValueError if no assignment is within the limit."""
    cheapest = 1 + sum(min(row.values()) for row in costs.values())
    if limit is not None and cheapest > limit + 1e-9:
        raise ValueError(
            f"no choice of sizes meets the limit {limit:g}: the cheapest costs {cheapest:.3f} of the unchanged "
            f"network. Raise the limit, or give smaller kernel_sizes."
        )


@dataclass(frozen=True)
class Candidate:
    """An assignment that was read on the whole selection half."""

    sizes: tuple[int, ...]
    loss: float
    cost: float
    """Relative to the unchanged network, predicted."""
    to_best: Interval
    """Its loss minus that of the best one within the limit."""
    to_unchanged: Interval
    """Its loss minus that of the unchanged network."""
    allowed: bool
    """Whether its cost is within the limit."""
    tied: bool
    """Whether it is allowed, and its loss is not larger than that of the best one, at 95 % and by a difference that
    counts."""


@dataclass(frozen=True)
class Decision:
    """The choice among the candidates, and whether sizes matter at all."""

    chosen: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    equality: float
    """The p-value of the hypothesis that one size everywhere gives the same loss, whatever the size."""
    spread: float
    """Largest minus smallest loss over the networks of one size."""
    matters: bool
    """Whether the sizes matter for these data: the hypothesis is rejected, and the spread is worth acting on."""


def decide(
    losses: Mapping[tuple[int, ...], Sequence[float]],
    groups: Groups,
    costs: Table,
    limit: float | None,
    untrained: float,
    seed: int = 0,
) -> Decision:
    """Choose the cheapest assignment whose loss is not significantly larger than that of the best one.

    Differences of less than 2 % of the loss, or of 1 % of what training took off it, do not count. Among assignments
    of practically equal cost, the one with the smallest loss is taken.

    Args:
        losses: sizes -> losses of the same images; the unchanged assignment and those of one size among them.
        groups: of the network.
        costs: as of :func:`relative_costs`.
        limit: largest relative cost; None: any.
        untrained: mean loss of a network that has not learned to look at images.
        seed: of the bootstrap.
    """
    unchanged = key_of(groups.unchanged, groups)
    allowed = [key for key in losses if fits(key, groups, limit, costs)]
    means = {key: float(np.mean(values)) for key, values in losses.items()}
    learned = untrained - min(means.values())
    practical = max(_RELATIVE * min(means.values()), _OF_WHAT_WAS_LEARNED * learned)
    best = min(allowed, key=lambda key: (means[key], cost_of(key, groups, costs)))
    candidates = []
    for key, values in losses.items():
        gap = paired(values, losses[best], seed)
        candidates.append(
            Candidate(
                sizes=key,
                loss=means[key],
                cost=cost_of(key, groups, costs),
                to_best=gap,
                to_unchanged=paired(values, losses[unchanged], seed),
                allowed=key in allowed,
                tied=key in allowed and gap.low <= practical,
            )
        )
    chosen = _cheapest([candidate for candidate in candidates if candidate.tied])
    alike = [
        key for key in dict.fromkeys(key_of(groups.uniform(size), groups) for size in groups.sizes) if key in losses
    ]
    p_value = equality(np.array([losses[key] for key in alike]), seed)
    spread = max(means[key] for key in alike) - min(means[key] for key in alike)
    return Decision(
        chosen.sizes, tuple(candidates), p_value, spread, p_value < 0.05 and spread >= practical and learned > 0
    )


def _cheapest(tied: Sequence[Candidate]) -> Candidate:
    """Return the cheapest candidate; the one with the smallest loss among those of practically the same cost."""
    least = min(candidate.cost for candidate in tied)
    same = [candidate for candidate in tied if candidate.cost <= least + _SAME_COST]
    return min(same, key=lambda candidate: (candidate.loss, candidate.cost))


@dataclass(frozen=True)
class Choice:
    """The chosen sizes, and what they were chosen from.

    Sizes are in the order of the groups.
    """

    sizes: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    """The assignments that were read on the whole selection half."""
    front: tuple[Point, ...]
    """The Pareto front of the additive model over all assignments."""
    model: Additive
    equality: float
    """The p-value of the hypothesis that networks of one size have the same loss, whatever the size."""
    spread: float
    """Largest minus smallest loss over the networks of one size."""
    matters: bool
    """Whether the sizes matter for these data."""
    predicted: float
    """Cost relative to the unchanged network, from the table of costs."""
    measured: float | None
    """Latency of the whole network relative to the unchanged one; None unless latency is the budget."""
    repeats: int
    """How often the choice was repeated because the measured latency missed the limit."""
