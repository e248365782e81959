"""Measure MoRF's figure 4, training and inference over sets of experts (``widefield bench mixture``).

Source: Lian, Yu, Wang 2024. On the shapes of ConvNeXt-T's four stages, depthwise, one layer:

- ``step``: forward and backward, gradients to the input, all kernels and biases, and the routing weights.
- ``inference``: forward under ``torch.no_grad()``; ours from the padded bank that reparameterization stores.

Peers, in both memory formats: the naive branches (n convolutions and a weighted sum), a single stock convolution as
large as the largest expert, and our own convolution of that size. None of them includes the routing network. Further
tables: many experts, hard routing, and dense mixtures, for which "auto" chooses between two backends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield import _checks, bench
from widefield.benchmarks import record
from widefield.benchmarks.record import Bar, Record, Row, bar
from widefield.benchmarks.settings import LAYOUTS, Ceilings, Settings, ceilings
from widefield.ops import bank_conv2d, depthwise_conv2d, explain, fold, mixture_conv2d

MODES = ("step", "inference")
SETS = ((3, 5, 7), (3, 5, 7, 9, 11), (3, 5, 7, 9, 11, 13, 15))
STANDARD = (3, 5, 7, 9, 11)
SHAPES = ((96, 56), (192, 28), (384, 14), (768, 7))
"""(channels, side) of ConvNeXt-T's stages."""
HARD_SETS = (STANDARD, (3, 7, 15, 23, 31))
COUNTS = (5, 64, 128)
COUNT_SHAPE = (384, 14)
DENSE_SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))
"""(channels, side) of ResNet's stages, measured with experts DENSE_SIZES and groups 1."""
DENSE_SIZES = (3, 5)
CHOSEN = 2
"""Experts per sample in hard routing."""

Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """One mixture: ``batch`` samples of (channels, side, side), experts of ``sizes``, depthwise or dense."""

    batch: int
    channels: int
    side: int
    sizes: tuple[int, ...]
    dense: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.channels} x {self.side}x{self.side}, {self.experts}"

    @property
    def experts(self) -> str:
        """The sizes, or with repeated sizes the number of experts and the range of sizes."""
        if len(set(self.sizes)) == len(self.sizes):
            return "{" + ", ".join(map(str, self.sizes)) + "}"
        return f"{len(self.sizes)} of {min(self.sizes)} to {max(self.sizes)}"

    @property
    def groups(self) -> int:
        """Number of groups of the convolutions."""
        return 1 if self.dense else self.channels


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case in one layout, shared by all peers."""

    x: Tensor
    kernels: list[Tensor]
    biases: list[Tensor]
    weights: Tensor
    hard: Tensor
    """``weights`` with all but the CHOSEN largest of a sample set to 0."""
    grad: Tensor
    groups: int

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that get a gradient in a training step."""
        return [self.x, *self.kernels, *self.biases, self.weights]


def inputs(case: Case, layout: str) -> Inputs:
    """Return the tensors of a case, drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.device, case.dtype)

    shape = (case.batch, case.channels, case.side, case.side)
    x, grad = (draw(*shape).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    kernels = [draw(case.channels, case.channels // case.groups, k, k).requires_grad_() for k in case.sizes]
    biases = [draw(case.channels).requires_grad_() for _ in case.sizes]
    weights = draw(case.batch, len(case.sizes)).abs() + 0.1
    least = weights.topk(min(CHOSEN, len(case.sizes)), dim=1).values[:, -1:]
    hard = torch.where(weights >= least, weights, 0.0)
    return Inputs(
        x.requires_grad_(), kernels, biases, weights.requires_grad_(), hard.requires_grad_(), grad, case.groups
    )


def naive(x: Tensor, kernels: Sequence[Tensor], biases: Sequence[Tensor], weights: Tensor, groups: int) -> Tensor:
    """Compute eq. 6 directly: one convolution per expert, and a weighted sum."""
    y = torch.zeros((), dtype=x.dtype, device=x.device)
    for r, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        y = y + weights[:, r, None, None, None] * F.conv2d(
            x, kernel, bias, padding=kernel.shape[-1] // 2, groups=groups
        )
    return y


def step(compute: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
    """Return a call of forward and backward. Experts that no sample chose have no gradient."""
    return lambda: torch.autograd.grad(compute(), leaves, grad, allow_unused=True)


def inference(compute: Callable[[], Tensor]) -> Callable[[], object]:
    """Return a call of only the forward pass."""

    def run() -> Tensor:
        with torch.no_grad():
            return compute()

    return run


def mixed(
    t: Inputs, mode: str, weights: Tensor, *, sparse: bool = False, backend: str = "auto"
) -> Callable[[], object]:
    """Return a call of our operator, with separate kernels in training and with their bank in inference."""
    if mode == "step":
        leaves = [t.x, *t.kernels, *t.biases, weights]
        return step(
            lambda: mixture_conv2d(t.x, t.kernels, t.biases, weights, groups=t.groups, sparse=sparse, backend=backend),
            leaves,
            t.grad,
        )
    sizes = [(k.shape[-1], 1) for k in t.kernels]
    bank = fold.kernel_bank(t.kernels, [1] * len(sizes)).detach()
    bias_bank = torch.stack(t.biases).detach()
    return inference(
        lambda: bank_conv2d(
            t.x, bank, bias_bank, weights, experts=sizes, groups=t.groups, sparse=sparse, backend=backend
        )
    )


def calls(case: Case, mode: str) -> Calls:
    """Return "ours NCHW", "branches ...", "stock largest ...", "our largest ..." -> a call, for one set of experts."""
    found: Calls = {}
    for layout in LAYOUTS:
        t = inputs(case, layout)
        found[f"ours {layout}"] = mixed(t, mode, t.weights)
        for name, (compute, leaves) in _peers(t).items():
            call = step(compute, leaves, t.grad) if mode == "step" else inference(compute)
            found[f"{name} {layout}"] = call
    return found


def _peers(t: Inputs) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """Return peer -> (its computation, the tensors that get a gradient)."""
    largest, bias = t.kernels[-1], t.biases[-1]
    padding = largest.shape[-1] // 2
    return {
        "branches": (lambda: naive(t.x, t.kernels, t.biases, t.weights, t.groups), t.leaves),
        "stock largest": (lambda: F.conv2d(t.x, largest, bias, 1, padding, 1, t.groups), [t.x, largest, bias]),
        "our largest": (lambda: depthwise_conv2d(t.x, largest, bias), [t.x, largest, bias]),
    }


def hard_calls(case: Case, mode: str) -> Calls:
    """Return calls of soft and hard routing; the latter has zeros, which ``sparse=True`` may skip."""
    found: Calls = {}
    for layout in LAYOUTS:
        t = inputs(case, layout)
        found[f"soft {layout}"] = mixed(t, mode, t.weights)
        found[f"hard {layout}"] = mixed(t, mode, t.hard, sparse=True)
    return found


def many_calls(cases: Sequence[Case], mode: str) -> Calls:
    """Return "64 NCHW" and so on -> a call, for mixtures with different numbers of experts."""
    return {
        f"{len(case.sizes)} {layout}": mixed(t, mode, t.weights)
        for case in cases
        for layout in LAYOUTS
        for t in [inputs(case, layout)]
    }


def dense_calls(case: Case, layout: str) -> Calls:
    """Return calls of a dense mixture's training step with each of the two backends."""
    t = inputs(case, layout)
    return {backend: mixed(t, "step", t.weights, backend=backend) for backend in ("branches", "merged")}


def rows_of(case: Case, mode: str, measured: dict[str, bench.Row]) -> list[Row]:
    """Return one row per layout of ours from measurements of :func:`calls`."""
    best = {name: min(measured[f"{name} {layout}"].p50 for layout in LAYOUTS) for name in ("branches", "stock largest")}
    rows = []
    for layout in LAYOUTS:
        mine = measured[f"ours {layout}"].p50
        rows.append(
            {
                **_about(case, mode, layout),
                "times": record.times(measured),
                "images_per_s": case.batch / mine,
                "branches_over_ours": best["branches"] / mine,
                "ours_over_stock_largest": mine / best["stock largest"],
                "ours_over_our_largest": mine / measured[f"our largest {layout}"].p50,
            }
        )
    return rows


def many_rows(cases: Sequence[Case], mode: str, measured: dict[str, bench.Row]) -> list[Row]:
    """Return rows from measurements of :func:`many_calls`; ratios are to the first case in the same layout."""
    first = len(cases[0].sizes)
    return [
        {
            **_about(case, mode, layout),
            "count": len(case.sizes),
            "times": record.times(measured),
            "over_first": measured[f"{len(case.sizes)} {layout}"].p50 / measured[f"{first} {layout}"].p50,
        }
        for case in cases
        for layout in LAYOUTS
    ]


def hard_rows(case: Case, mode: str, measured: dict[str, bench.Row]) -> list[Row]:
    """Return one row per layout from measurements of :func:`hard_calls`."""
    return [
        {
            **_about(case, mode, layout),
            "times": record.times(measured),
            "soft_over_hard": measured[f"soft {layout}"].p50 / measured[f"hard {layout}"].p50,
        }
        for layout in LAYOUTS
    ]


def dense_row(case: Case, layout: str, measured: dict[str, bench.Row]) -> Row:
    """Return a row from measurements of :func:`dense_calls`, including the backend that "auto" chooses."""
    t = inputs(case, layout)
    choice = explain(mixture_conv2d, t.x, t.kernels, t.biases, t.weights, groups=t.groups)["mixture"]
    return {
        **_about(case, "step", layout),
        "times": record.times(measured),
        "branches_over_merged": measured["branches"].p50 / measured["merged"].p50,
        "auto": choice.backend,
    }


def _about(case: Case, mode: str, layout: str) -> Row:
    return {
        "label": f"{case}, {layout}, {mode}",
        "batch": case.batch,
        "channels": case.channels,
        "side": case.side,
        "sizes": list(case.sizes),
        "experts": case.experts,
        "mode": mode,
        "layout": layout,
    }


def _time(name: str) -> Callable[[Row], str]:
    return lambda r: record.milliseconds(r["times"][name.format(**r)])


def _ratio(name: str) -> Callable[[Row], str]:
    return lambda r: f"{r[name]:.2f}"


_SHAPE: dict[str, Callable[[Row], str]] = {
    "shape": lambda r: f"{r['channels']} x {r['side']}x{r['side']}",
    "experts": lambda r: str(r["experts"]),
    "mode": lambda r: str(r["mode"]),
    "layout": lambda r: str(r["layout"]),
}
COLUMNS = {
    **_SHAPE,
    "ours, ms (p20-p80)": _time("ours {layout}"),
    "branches": _time("branches {layout}"),
    "stock largest": _time("stock largest {layout}"),
    "our largest": _time("our largest {layout}"),
    "images/s": lambda r: f"{r['images_per_s']:.0f}",
    "branches / ours": _ratio("branches_over_ours"),
    "ours / stock largest": _ratio("ours_over_stock_largest"),
    "ours / our largest": _ratio("ours_over_our_largest"),
}
HARD_COLUMNS = {**_SHAPE, "soft, ms (p20-p80)": _time("soft {layout}"), "hard": _time("hard {layout}")}
HARD_COLUMNS["soft / hard"] = _ratio("soft_over_hard")
MANY_COLUMNS = {**_SHAPE, "ours, ms (p20-p80)": _time("{count} {layout}"), "over the first": _ratio("over_first")}
DENSE_COLUMNS = {**_SHAPE, "branches, ms (p20-p80)": _time("branches"), "merged": _time("merged")}
DENSE_COLUMNS |= {"branches / merged": _ratio("branches_over_merged"), "auto": lambda r: str(r["auto"])}


def run(
    settings: Settings,
    *,
    batch_size: int = 16,
    shapes: Sequence[tuple[int, int]] | None = None,
    sets: Sequence[Sequence[int]] | None = None,
    counts: Sequence[int] | None = None,
    dense_shapes: Sequence[tuple[int, int]] | None = None,
    top: Ceilings | None = None,
) -> list[Bar]:
    """Run the benchmark: print rows, write files to ``settings.out`` and return the bars.

    Args:
        settings: of the measurement.
        batch_size: samples of every row.
        shapes: (channels, side) of the depthwise rows; ConvNeXt-T's stages when None. Many experts are measured on
            the last of ``shapes``, or on 384 x 14x14 when None.
        sets: sets of experts' sizes; the paper's when None.
        counts: numbers of experts, sizes 3 to 11 repeated; 5, 64 and 128 when None. Ratios are to the first.
        dense_shapes: (channels, side) of the dense rows; when None, ResNet's stages, or no rows if ``shapes`` is given.
        top: the machine's ceilings; measured when None.

    Raises:
        ValueError: numbers out of range, even kernels.
    """
    batch_size = _checks.integer("batch_size", batch_size)
    if dense_shapes is None:
        dense_shapes = DENSE_SHAPES if shapes is None else ()
    count_shape = COUNT_SHAPE if shapes is None else shapes[-1]
    shapes = [(_checks.integer("channels", c), _checks.integer("side", s)) for c, s in shapes or SHAPES]
    families = [tuple(k for k, _ in _checks.experts(sizes)) for sizes in sets or SETS]
    counts = [_checks.integer("counts", n) for n in counts or COUNTS]

    def case(shape: tuple[int, int], sizes: tuple[int, ...], *, dense: bool = False) -> Case:
        return Case(batch_size, *shape, sizes, dense, settings.torch_dtype, settings.device)

    out = Record("mixture", settings)
    top = top or ceilings(settings)
    out.fact(f"Ceilings in this run: {top}. Batch {batch_size}, one layer.")
    out.fact("Columns of times and 'ours / our largest' are of the row's layout; other peers at their better layout.")
    main = out.table("Sets of experts", COLUMNS, "MoRF, figure 4: throughput against cumulative sets of experts.")
    many = out.table("Many experts", MANY_COLUMNS, f"Sizes 3 to 11 repeated; ratio to {counts[0]} experts.")
    hard = out.table("Hard routing", HARD_COLUMNS, f"The {CHOSEN} largest weights of a sample kept, the others 0.")
    dense = out.table("Dense mixtures", DENSE_COLUMNS, "groups=1. The last column is what 'auto' takes.")
    with out.until_interrupted():
        for shape, sizes, mode in itertools.product(shapes, families, MODES):
            one = case(shape, sizes)
            for row in rows_of(one, mode, settings.measure(calls(one, mode))):
                out.add(main, row)
        crowds = [case(count_shape, tuple(STANDARD[r % len(STANDARD)] for r in range(n))) for n in counts]
        for mode in MODES:
            for row in many_rows(crowds, mode, settings.measure(many_calls(crowds, mode))):
                out.add(many, row)
        for shape, sizes, mode in itertools.product(shapes, HARD_SETS, MODES):
            one = case(shape, sizes)
            for row in hard_rows(one, mode, settings.measure(hard_calls(one, mode))):
                out.add(hard, row)
        for shape, layout in itertools.product(dense_shapes, LAYOUTS):
            one = case(shape, DENSE_SIZES, dense=True)
            out.add(dense, dense_row(one, layout, settings.measure(dense_calls(one, layout))))
    bars = (cpu_bars if settings.device == "cpu" else cuda_bars)(main.rows, many.rows, hard.rows)
    digest = [(f"{mode}, images/s", throughput(main.rows, mode)) for mode in MODES]
    out.finish(bars, [(title, lines) for title, lines in digest if lines])
    return bars


def throughput(rows: Sequence[Row], mode: str) -> list[dict[str, str]]:
    """Format one mode like figure 4: images/s of one layer over sets of experts, each in its better layout."""
    lines = []
    for row in rows:
        if row["mode"] != mode or row["layout"] != "NCHW":
            continue
        line = {"shape": f"{row['channels']} x {row['side']}x{row['side']}", "experts": row["experts"]}
        for name in ("ours", "branches", "our largest", "stock largest"):
            line[name] = f"{row['batch'] / record.in_better_layout(row, name):.0f}"
        lines.append(line)
    return lines


def _ours(row: Row, over: str) -> float:
    """Return the time of our better layout over that of a peer's better layout."""
    return record.in_better_layout(row, "ours") / record.in_better_layout(row, over)


def _steps(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r["mode"] == "step" and r["sizes"] == list(STANDARD)]


def cpu_bars(rows: Sequence[Row], many: Sequence[Row], hard: Sequence[Row]) -> list[Bar]:
    """Compare rows with the project's bars on a CPU: all layouts of ours, and our better one."""
    steps = _steps(rows)
    wide = [r for r in steps if r["side"] >= 14]
    return [
        bar(
            "{3..11} step, each layout: branches, better layout / ours",
            steps,
            lambda r: float(r["branches_over_ours"]),
            at_least=4,
        ),
        bar(
            "{3..11} step, our better layout: branches, better layout / ours",
            steps,
            lambda r: 1 / _ours(r, "branches"),
            at_least=4,
        ),
        bar(
            "{3..11} step, each layout: ours / stock 11x11, better layout",
            steps,
            lambda r: float(r["ours_over_stock_largest"]),
            at_most=0.85,
        ),
        bar(
            "{3..11} step, our better layout: ours / stock 11x11, better layout",
            steps,
            lambda r: _ours(r, "stock largest"),
            at_most=0.85,
        ),
        bar(
            "{3..11} step, each layout, maps of 14 and more: ours / our 11x11, same layout",
            wide,
            lambda r: float(r["ours_over_our_largest"]),
            at_most=1.7,
        ),
        bar(
            "{3..11} step, better layouts, maps of 14 and more: ours / our 11x11",
            wide,
            lambda r: _ours(r, "our largest"),
            at_most=1.7,
        ),
        _many_bar(many),
        _hard_bar(hard),
    ]


def cuda_bars(rows: Sequence[Row], many: Sequence[Row], hard: Sequence[Row]) -> list[Bar]:
    """Compare rows with the project's bars on a GPU."""
    steps = _steps(rows)
    return [
        bar(
            "{3..11} step, each layout: branches, better layout / ours",
            steps,
            lambda r: float(r["branches_over_ours"]),
            at_least=2.5,
        ),
        bar(
            "{3..11} step, each layout: our 11x11, same layout / ours",
            steps,
            lambda r: 1 / float(r["ours_over_our_largest"]),
            at_least=0.8,
        ),
        _many_bar(many),
        _hard_bar(hard),
    ]


def _many_bar(many: Sequence[Row]) -> Bar:
    rows = [r for r in many if r["count"] == 64 and r["mode"] == "step"]
    return bar("step of 64 experts / step of five", rows, lambda r: float(r["over_first"]), at_most=1.5)


def _hard_bar(hard: Sequence[Row]) -> Bar:
    return bar("hard routing: soft, same layout / hard", hard, lambda r: float(r["soft_over_hard"]), at_least=0.95)
