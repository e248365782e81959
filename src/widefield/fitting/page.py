"""Show a fit on a page: the verdict, what the layers wanted and got, the Pareto front, and the networks compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from widefield import report
from widefield.fitting.choose import Candidate, assignment_of
from widefield.fitting.figures import DRAWN_FIELD, FIELD, draw_front, draw_wanted
from widefield.fitting.progress import PHASES, duration
from widefield.report import Part, Plot, Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from widefield.fitting.result import FitResult, Network

_WANTED = (
    "Change of the probed network's loss if one group of layers gets another size and the others stay. Below zero is "
    "better. Circles: the size before. Stars: the chosen size."
)
_FRONT = (
    "Loss of the probed network on the selection half against cost. Line: the front that the additive model predicts. "
    "Points: assignments that were read on all images of the half, with 95 % intervals of the difference to the best "
    "one. The choice is the cheapest one within the limit whose interval reaches the best."
)
_RINGS = (
    "Share of the squared weights by square ring around the center, in each layer's largest kernel after probing. It "
    "describes the kernels; it does not decide."
)
_SIZES = (
    "Mean rating of images by the size of their object, with 95 % intervals of the difference. Bars: before and after."
)
_FIELD = (
    "Effective receptive field: by how much each pixel changes the center of the last map, averaged over images. "
    "The table says how large the smallest central square with this share of it is, relative to the image."
)
_SHOWN = 12
"""Most candidates in a table."""


def page(result: FitResult) -> str:
    """Return the page of a finished fit as an HTML document that holds its pictures."""
    verdict = result.verdict
    sections = [
        Section("Before and after", [Table(network_rows(result))]),
        Section("What each group of layers wanted, and got", wanted(result)),
        Section("Loss and cost", _candidates(result)),
    ]
    if verdict.sizes:
        sections.append(Section("By object size", [Plot(draw_sizes(result), _SIZES), Table(_size_rows(result))]))
    field = _field(result)
    if field:
        sections.append(Section("Effective receptive field", field))
    if result.readings.rings:
        sections.append(Section("Where the kernels have their weight", [Plot(draw_rings(result), _RINGS)]))
    sections.append(Section("How it was found", _method(result)))
    title = f"{verdict.words[0].upper()}{verdict.words[1:]}"
    return report.page(f"{result.spec.recipe.name}: {title}", "", sections, dict(result.environment), [verdict.text])


def network_rows(result: FitResult) -> list[dict[str, str]]:
    """Return the two networks as columns of a table, and their ratio."""
    verdict = result.verdict
    before, after = verdict.unchanged, verdict.plain

    def row(name: str, form: str, values: tuple[float, float], *, ratio: bool = True) -> dict[str, str]:
        old, new = values
        change = f"{new / old:.2f} x" if ratio and old else f"{new - old:+.4g}"
        return {"": name, "unchanged": form.format(old), "chosen sizes": form.format(new), "change": change}

    rows = [
        row(name, "{:.4g}", (before.metrics[name], value), ratio=False)
        for name, value in after.metrics.items()
        if name in before.metrics
    ]
    rows.sort(key=lambda found: found[""] != verdict.headline)
    costs: Sequence[tuple[str, Any]] = (
        ("latency, ms", lambda network: 1e3 * network.latency),
        ("MACs, millions", lambda network: network.macs / 1e6),
        ("parameters, thousands", lambda network: network.parameters / 1e3),
    )
    return rows + [row(name, "{:,.4g}", (read(before), read(after))) for name, read in costs]


def wanted(result: FitResult) -> list[Part]:
    """Return what each group of layers wanted and got, as a figure and a table."""
    model = result.choice.model
    fit = f"A sum over the groups explains {100 * model.explained:.0f} % of the variance of the readings."
    return [Plot(draw_wanted(result.choice, result.groups), _WANTED), Table(result.rows(), "Groups of layers"), fit]


def _candidates(result: FitResult) -> list[Part]:
    choice = result.choice
    rows = [
        {
            "sizes": ", ".join(map(str, found.sizes)),
            "loss": f"{found.loss:.4f}",
            "to the best one": f"{found.to_best.mean:+.4f} ({found.to_best.low:+.4f} to {found.to_best.high:+.4f})",
            f"{result.costs.budget}, of before": f"{found.cost:.3f}",
            "": _mark(result, found),
        }
        for found in sorted(choice.candidates, key=lambda found: found.loss)[:_SHOWN]
    ]
    measured = "" if choice.measured is None else f" The whole network was then measured: {choice.measured:.3f}."
    if choice.repeats:
        measured += f" The limit was tightened {choice.repeats} times, as measured latencies were above it."
    words = f"Predicted {result.costs.budget} of the choice: {choice.predicted:.3f} of the unchanged network.{measured}"
    alike = (
        f"Networks of one size differ by {choice.spread:.4f} in loss (p = {choice.equality:.3f} for no difference): "
        f"the field {'matters' if choice.matters else 'does not matter'} for these data."
    )
    front = draw_front(choice, result.groups, result.costs, result.spec.limit)
    return [Plot(front, _FRONT), Table(rows, "Candidates"), words, alike]


def _mark(result: FitResult, found: Candidate) -> str:
    marks = []
    if found.sizes == result.choice.sizes:
        marks.append("chosen")
    if assignment_of(found.sizes, result.groups) == result.groups.unchanged:
        marks.append("unchanged")
    if not found.allowed:
        limit = result.spec.limit
        marks.append("above the limit" if limit is not None and found.cost > limit else "above the tightened limit")
    return ", ".join(marks)


def _size_rows(result: FitResult) -> list[dict[str, str]]:
    return [
        {
            "object, pixels": f"{row.low:.0f} to {row.high:.0f}",
            "unchanged": f"{row.unchanged:.3f}",
            "chosen sizes": f"{row.plain:.3f}",
            "difference": f"{row.difference.mean:+.3f} ({row.difference.low:+.3f} to {row.difference.high:+.3f})",
        }
        for row in result.verdict.sizes
    ]


def field_of(result: FitResult, caption: str) -> list[Part]:
    """Return the drawing of the effective receptive fields in the fit's folder, if there is one."""
    file, drawing = result.folder / FIELD, result.folder / DRAWN_FIELD
    if not file.is_file():
        return []
    drawn = drawing.read_bytes() if drawing.is_file() else b""
    return [report.Photo(file.read_bytes(), "png", caption, drawn)]


def _field(result: FitResult) -> list[Part]:
    verdict = result.verdict
    networks: dict[str, Network] = {"unchanged": verdict.unchanged, "chosen sizes": verdict.plain}
    rows = [
        {"": name, **{f"{100 * float(share):.0f} %": f"{100 * ratio:.1f} %" for share, ratio in found.field.items()}}
        for name, found in networks.items()
        if found.field
    ]
    drawn = field_of(result, _FIELD)
    return [*drawn, Table(rows)] if rows and drawn else []


def _method(result: FitResult) -> list[Part]:
    probe, settle = result.spec.shares()
    unit = result.spec.unit
    words = (
        f"A network that can run at all sizes learned for {probe} {unit}s. Its loss was read at "
        f"{len(result.readings.first)} assignments on one half of the val split, and at {len(result.readings.whole)} "
        f"of them on all images of that half. The plain network with the chosen sizes then learned for {settle} "
        f"{unit}s, the unchanged one for {probe + settle}. Both were compared on the other half, which nothing was "
        f"chosen on."
    )
    seconds = [{"phase": name, "time": duration(result.seconds[name])} for name in PHASES if name in result.seconds]
    costs = Table(result.costs.rows(), "Costs of each size")
    return [words, Table(seconds), costs, *result.groups.notes, *result.verdict.notes]


@report.paper()
def draw_sizes(result: FitResult) -> Figure:
    """Draw the ratings by object size, before and after."""
    rows = result.verdict.sizes
    places = np.arange(len(rows))
    figure = report.blank(report.PAGE * 0.6, 2.3)
    axis = figure.subplots()
    before, after = [row.unchanged for row in rows], [row.plain for row in rows]
    axis.bar(places - 0.2, before, 0.38, color="0.75", label="unchanged")
    middle = np.array([row.difference.mean for row in rows])
    ends = np.array([[row.difference.low for row in rows], [row.difference.high for row in rows]])
    axis.bar(
        places + 0.2, after, 0.38, yerr=np.abs(ends - middle), color=report.COLORS[0], label="chosen sizes",
        error_kw={"elinewidth": 0.6},
    )  # fmt: skip
    axis.set_xticks(places, [f"{row.low:.0f} to {row.high:.0f}" for row in rows])
    axis.set(xlabel="size of the object (pixels)", ylabel="mean rating")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=6, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


@report.paper()
def draw_rings(result: FitResult) -> Figure:
    """Draw the share of the squared weights in each ring, a row for each layer."""
    rings = result.readings.rings
    most = max(map(len, rings.values()))
    shares = np.full((len(rings), most), np.nan)
    for row, values in enumerate(rings.values()):
        shares[row, : len(values)] = values
    figure = report.blank(report.PAGE * 0.6, 0.8 + 0.2 * len(rings))
    axis = figure.subplots()
    shown = axis.imshow(100 * shares, aspect="auto", cmap="YlGnBu", vmin=0)
    axis.set_yticks(range(len(rings)), list(rings))
    axis.set_xticks(range(most), [str(2 * ring + 1) for ring in range(most)])
    axis.set(xlabel="side of the ring (taps)")
    axis.tick_params(length=0)
    figure.colorbar(shown, ax=axis, label="% of the weight", shrink=0.9)
    return figure
