"""Measure every pass of RepLKNet's table 1, ours against F.conv2d (``widefield bench depthwise``).

Source: Ding et al. 2022, who time a stack of 24 depthwise layers on (64, 384, R, R). Here the layers are parallel on
one input, so that each pass can be timed by itself:

- ``forward``: the operator under ``torch.no_grad()``.
- ``input_grad``, ``weight_grad``: ``torch.autograd.grad`` of a graph in which only the input, or only the kernel,
  requires a gradient. Graphs are built beforehand and retained. Both sides include autograd's own overhead.
- ``backward``: the same with both gradients.

All four peers, ours and stock in both memory formats, are interleaved on the same tensors. Columns of ratios are times
of F.conv2d over times of ours: *same layout* on the same tensor, *better layout* the faster of the two formats.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from widefield import _checks
from widefield.benchmarks import record
from widefield.benchmarks.record import Bar, Record, Row, bar
from widefield.benchmarks.settings import LAYOUTS, Ceilings, Settings, ceilings
from widefield.ops import depthwise_conv2d, explain
from widefield.ops._problem import multiply_adds

STEPS = ("forward", "input_grad", "weight_grad", "backward")
CHANNELS = 384
RESOLUTIONS = (16, 32, 64)
KERNELS = (3, 5, 7, 9, 13, 17, 21, 27, 29, 31)
MORE_SHAPES = ((96, 56), (192, 28), (384, 14), (768, 7))
"""(channels, side) of ConvNeXt-T's stages, measured with MORE_KERNELS on CPUs."""
MORE_KERNELS = (7, 11, 31)
LARGE_SHAPES = ((384, 28), (384, 56), (768, 28), (768, 56))
"""(channels, side) of the project's bars, measured with LARGE_KERNELS on CPUs."""
LARGE_KERNELS = (7, 31)
HALF_SHAPES = ((384, 28), (384, 14))
"""(channels, side) measured with HALF_KERNELS in bfloat16 on CPUs."""
HALF_KERNELS = (3, 7, 13, 31)

STRIDED_SHAPES = ((96, 56), (192, 28), (384, 14))
"""(channels, side) measured with STRIDED_KERNELS and stride 2 on CPUs, as in MobileNets and EfficientNets."""
STRIDED_KERNELS = (5, 7, 13)
BAND_SHAPES = ((96, 56), (384, 14))
"""(channels, side) measured with BANDS on CPUs."""
BANDS = ((51, 5), (5, 51), (11, 1), (1, 11))
"""(rows, columns) of SLaK's and InceptionNeXt's kernels."""

NOISE = 0.95
"""Smallest ratio that counts as not slower: timings of equal calls differ by a few percent."""
_DOUBTFUL = 0.98
"""Smaller ratios are measured again."""

Op = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Case:
    """A set of ``layers`` depthwise convolutions of (batch, channels, side, side), padded by half a kernel."""

    batch: int
    channels: int
    side: int
    kernel: tuple[int, int]
    layers: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    stride: int = 1

    def __str__(self) -> str:
        dtype = "" if self.dtype == torch.float32 else f" {str(self.dtype).removeprefix('torch.')}"
        return f"{self.channels} x {self.side}x{self.side}, K={self.size}{dtype}"

    @property
    def size(self) -> str:
        """The kernel as text: "7", "51x5", or "7 /2" with a stride of two."""
        rows, columns = self.kernel
        step = f" /{self.stride}" if self.stride > 1 else ""
        return f"{columns if rows == columns else f'{rows}x{columns}'}{step}"

    def flops(self, step: str) -> int:
        """Return the operations of a pass: two per product of a tap and a pixel; padding is not counted."""
        half = self.kernel[0] // 2, self.kernel[1] // 2
        products = multiply_adds((self.side, self.side), self.kernel, (self.stride, self.stride), half, (1, 1))
        return 2 * self.layers * self.batch * self.channels * products * (2 if step == "backward" else 1)

    def tensors(self, layout: str) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return the input, the layers' kernels and the gradient of an output, drawn with a fixed seed."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        sides = self.side, -(-self.side // self.stride)
        x, grad = (
            draw(self.batch, self.channels, side, side).contiguous(memory_format=LAYOUTS[layout]) for side in sides
        )
        return x, [draw(self.channels, 1, *self.kernel) for _ in range(self.layers)], grad


def ours(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Run our operator with ``backend="auto"``."""
    return depthwise_conv2d(x, weight, stride=stride, padding=_half(weight))


def stock(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Run ``F.conv2d``."""
    return F.conv2d(x, weight, None, stride, _half(weight), groups=x.shape[1])


def upcast(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Run ``F.conv2d`` in float32 and cast back, the usual workaround for slow 16-bit convolutions."""
    return stock(x.float(), weight.float(), stride).to(x.dtype)


def _half(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2] // 2, weight.shape[3] // 2


def calls(case: Case, step: str) -> dict[str, Callable[[], object]]:
    """Return "ours NCHW", "stock channels_last" and so on -> a call of one pass of all layers."""
    peers = {"ours": ours, "stock": stock}
    if case.device == "cpu" and case.dtype != torch.float32:
        peers["upcast"] = upcast
    found = {}
    for layout in LAYOUTS:
        tensors = case.tensors(layout)
        for name, op in peers.items():
            found[f"{name} {layout}"] = _call(op, *tensors, case.stride, step)
    return found


def _call(op: Op, x: Tensor, weights: Sequence[Tensor], grad: Tensor, stride: int, step: str) -> Callable[[], object]:
    def forward() -> None:
        with torch.no_grad():
            for weight in weights:
                op(x, weight, stride)

    if step == "forward":
        return forward
    leaf = x.detach().requires_grad_(step != "weight_grad")
    graphs = []
    for weight in weights:
        kernel = weight.detach().requires_grad_(step != "input_grad")
        wanted = [tensor for tensor in (leaf, kernel) if tensor.requires_grad]
        graphs.append((get_gradient_edge(op(leaf, kernel, stride)), wanted))  # an edge does not keep outputs alive

    def backward() -> Tensor:
        for edge, wanted in graphs:
            result = torch.autograd.grad(edge, wanted, grad, retain_graph=True)
        return result[-1]

    return backward


def backends(case: Case, layout: str) -> dict[str, str]:
    """Return pass -> its backend."""
    x, weights, _ = replace(case, layers=1).tensors(layout)
    found = explain(depthwise_conv2d, x, weights[0], stride=case.stride, padding=_half(weights[0]))
    return {step: found[step].backend for step in ("forward", "input_grad", "weight_grad")}


def rows_of(case: Case, step: str, settings: Settings, top: Ceilings) -> Iterator[Row]:
    """Measure one pass; yield one row per layout of ours.

    If ours is more than 2% slower than stock in a layout, all peers are measured again with three times the repeats,
    and only that second measurement is reported.
    """
    called = calls(case, step)
    measured = settings.measure(called)
    pairs = [(measured[f"ours {layout}"].p50, measured[f"stock {layout}"].p50) for layout in LAYOUTS]
    again = any(peer < _DOUBTFUL * mine for mine, peer in pairs)
    if again:
        measured = settings.measure(called, more=3)
    best = min(measured[f"stock {layout}"].p50 for layout in LAYOUTS)
    for layout in LAYOUTS:
        mine, chosen = measured[f"ours {layout}"], backends(case, layout)
        passes = ("input_grad", "weight_grad") if step == "backward" else (step,)
        speed = case.flops(step) / mine.p50
        row: Row = {
            "label": f"{case}, {layout}, {step}",
            "batch": case.batch,
            "channels": case.channels,
            "side": case.side,
            "kernel": case.size,
            "layers": case.layers,
            "dtype": str(case.dtype).removeprefix("torch."),
            "layout": layout,
            "step": step,
            "backend": " + ".join(dict.fromkeys(chosen[name] for name in passes)),
            "is_stock": case.device == "cpu" and {chosen[name] for name in ("forward", *passes)} == {"aten"},
            "times": record.times(measured),
            "same_layout": measured[f"stock {layout}"].p50 / mine.p50,
            "better_layout": best / mine.p50,
            "flops_per_s": speed,
            "of_gemm": speed / top.gemm_flops,
            "measured_again": again,
        }
        if f"upcast {layout}" in measured:
            row["upcast"] = measured[f"upcast {layout}"].p50 / mine.p50
        if step == "weight_grad":
            call = called[f"ours {layout}"]
            row["same_bits"] = bool(torch.equal(_tensor(call()), _tensor(call())))
        yield row


def _tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"expected a tensor; got {type(value).__name__}.")
    return value


COLUMNS: dict[str, Callable[[Row], str]] = {
    "shape": lambda r: f"{r['batch']} x {r['channels']} x {r['side']}x{r['side']}",
    "K": lambda r: r["kernel"],
    "step": lambda r: r["step"],
    "layout": lambda r: r["layout"],
    "ours, ms (p20-p80)": lambda r: record.milliseconds(r["times"][f"ours {r['layout']}"]),
    "F.conv2d, ms (p20-p80)": lambda r: record.milliseconds(r["times"][f"stock {r['layout']}"]),
    "same layout": lambda r: f"{r['same_layout']:.2f}",
    "better layout": lambda r: f"{r['better_layout']:.2f}",
    "GFLOP/s": lambda r: f"{r['flops_per_s'] / 1e9:.3g}",
    "of gemm": lambda r: f"{100 * r['of_gemm']:.0f}%",
    "backend": lambda r: r["backend"],
}
UPCAST_COLUMNS = {**COLUMNS, "upcast / ours": lambda r: f"{r['upcast']:.2f}"}


def run(
    settings: Settings,
    *,
    channels: int | None = None,
    resolutions: Sequence[int] | None = None,
    kernels: Sequence[int] | None = None,
    batch_size: int | None = None,
    layers: int | None = None,
    top: Ceilings | None = None,
) -> list[Bar]:
    """Run the benchmark: print rows, write files to ``settings.out`` and return the bars.

    Args:
        settings: of the measurement.
        channels, resolutions, kernels: RepLKNet's when None. If all are None, CPUs also measure the shapes of
            ConvNeXt-T, larger ones, and some in bfloat16.
        batch_size: when None, 64 on CUDA devices; on CPUs enough for 4096 pixels, at most 8.
        layers: when None, 24 on CUDA devices and 1 on CPUs.
        top: the machine's ceilings; measured when None.

    Raises:
        ValueError: numbers out of range, even kernels.
    """
    on_cpu = settings.device == "cpu"
    whole = on_cpu and channels is None and resolutions is None and kernels is None
    channels = _checks.integer("channels", CHANNELS if channels is None else channels)
    sides = [_checks.integer("resolutions", side) for side in resolutions or RESOLUTIONS]
    sizes = [size for size, _ in _checks.experts(kernels or KERNELS)]
    layers = _checks.integer("layers", (1 if on_cpu else 24) if layers is None else layers)
    if batch_size is not None:
        batch_size = _checks.integer("batch_size", batch_size)

    def case(c: int, side: int, kernel: int | tuple[int, int], dtype: torch.dtype, stride: int = 1) -> Case:
        count = batch_size or (scaled_batch(c, side) if on_cpu else 64)
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        return Case(count, c, side, size, layers, dtype, settings.device, stride)

    out = Record("depthwise", settings)
    top = top or ceilings(settings)
    out.fact(f"Ceilings in this run: {top}. Layers of each row: {layers}. Ratios are F.conv2d's time over ours.")
    if on_cpu and batch_size is None:
        out.fact("Scaled down for a CPU: the paper has 24 layers and a batch of 64; here each row says its batch.")
    dtype = settings.torch_dtype
    columns = UPCAST_COLUMNS if on_cpu and dtype != torch.float32 else COLUMNS

    parts = [(out.table("RepLKNet, table 1", columns), [case(channels, r, k, dtype) for r in sides for k in sizes])]
    if whole:
        for title, shapes, wanted in (
            ("ConvNeXt-T's stages", MORE_SHAPES, MORE_KERNELS),
            ("Large maps, many channels", LARGE_SHAPES, LARGE_KERNELS),
        ):
            parts.append((out.table(title, columns), [case(c, r, k, dtype) for c, r in shapes for k in wanted]))
        strided = [case(c, r, k, dtype, stride=2) for c, r in STRIDED_SHAPES for k in STRIDED_KERNELS]
        parts.append((out.table("A stride of two", columns), strided))
        parts.append((out.table("Bands", columns), [case(c, r, k, dtype) for c, r in BAND_SHAPES for k in BANDS]))
    if whole and dtype == torch.float32:
        cases = [case(c, r, k, torch.bfloat16) for c, r in HALF_SHAPES for k in HALF_KERNELS]
        parts.append((out.table("bfloat16", UPCAST_COLUMNS), cases))
    with out.until_interrupted():
        for table, cases in parts:
            for one, step in itertools.product(cases, STEPS):
                for row in rows_of(one, step, settings, top):
                    out.add(table, row)
    paper, rows = parts[0][0].rows, [row for table, _ in parts for row in table.rows]
    bars = cpu_bars(rows) if on_cpu else cuda_bars(rows, settings.dtype)
    digest = [(f"{step}, ms for {layers} layer(s)", latencies(paper, step)) for step in ("forward", "backward")]
    out.finish(bars, [(title, lines) for title, lines in digest if lines])
    return bars


def scaled_batch(channels: int, side: int) -> int:
    """Return a CPU's batch size: a power of two, at most 8, for about 4096 pixels (fewer above 384 channels)."""
    images = 4096 * min(1.0, 384 / channels) / side**2
    return next((n for n in (8, 4, 2) if images >= n), 1)


def latencies(rows: Sequence[Row], step: str) -> list[dict[str, str]]:
    """Format one pass like the paper's table: a row per resolution and peer, a column per kernel."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        if row["step"] != step:
            continue
        for peer in ("stock", "ours"):
            at = (f"{row['side']}x{row['side']}", f"{peer} {row['layout']}".replace("stock", "F.conv2d"))
            cells = found.setdefault(at, {"R": at[0], "": at[1]})
            cells[row["kernel"]] = record.milliseconds(row["times"][f"{peer} {row['layout']}"]).split()[0]
    return list(found.values())


def cpu_bars(rows: Sequence[Row]) -> list[Bar]:
    """Compare rows with the project's bars on a CPU."""
    single = [r for r in rows if r["dtype"] == "float32"]
    large = [r for r in single if r["kernel"] == "31" and r["step"] == "forward" and r["side"] >= 28]
    many = [r for r in large if r["channels"] >= 384]
    weight = [r for r in single if r["step"] == "weight_grad" and 28 <= r["side"] <= 56]

    def over_channels_last(row: Row) -> float:
        mine, peer = row["times"][f"ours {row['layout']}"], row["times"]["stock channels_last"]
        return float(peer["p50"] / mine["p50"])

    return [
        bar(
            "31x31 forward, maps of 28 and more, NCHW: F.conv2d NCHW / ours",
            [r for r in large if r["layout"] == "NCHW"],
            _same,
            at_least=20,
        ),
        *(
            bar(
                f"31x31 forward, 384 channels and more, maps of 28 and more, {layout}: F.conv2d channels_last / ours",
                [r for r in many if r["layout"] == layout],
                over_channels_last,
                at_least=1.4,
            )
            for layout in LAYOUTS
        ),
        *(
            bar(
                f"weight gradient, K={kernel}, maps of 28 to 56, {layout}: better F.conv2d layout / ours",
                [r for r in weight if r["kernel"] == str(kernel)],
                ratio,
                at_least=limit,
            )
            for kernel, limit in ((7, 2), (31, 25))
            for layout, ratio in (("each layout", _better), ("our better layout", _better_of_both))
        ),
        *_no_slower(rows),
        *(
            bar(
                f"16 bits, {step}: upcast F.conv2d, same layout / ours",
                [r for r in rows if "upcast" in r and r["step"] == step],
                lambda r: float(r["upcast"]),
                at_least=NOISE,
            )
            for step in ("forward", "backward")
        ),
        _same_bits(rows),
    ]


def cuda_bars(rows: Sequence[Row], dtype: str) -> list[Bar]:
    """Compare rows with the project's bars on a GPU."""
    large = [r for r in rows if r["kernel"] == "31" and r["side"] == 32]
    return [
        *(
            bar(
                f"K=31, R=32, {step}, {dtype}: better F.conv2d layout / ours",
                [r for r in large if r["step"] == step],
                _better,
                at_least=3,
            )
            for step in ("forward", "backward")
        ),
        *(
            bar(
                f"K<=7, {step}, {dtype}: F.conv2d, same layout / ours",
                [r for r in rows if r["kernel"] in ("3", "5", "7") and r["step"] == step],
                _same,
                at_least=NOISE,
            )
            for step in ("forward", "backward")
        ),
        *_no_slower(rows),
        _same_bits(rows),
    ]


def _same(row: Row) -> float:
    return float(row["same_layout"])


def _better(row: Row) -> float:
    return float(row["better_layout"])


def _better_of_both(row: Row) -> float:
    return record.in_better_layout(row, "stock") / record.in_better_layout(row, "ours")


def _no_slower(rows: Sequence[Row]) -> list[Bar]:
    return [
        bar(
            f"every row, {step}: F.conv2d, same layout / ours",
            [r for r in rows if r["step"] == step and not r["is_stock"]],
            _same,
            at_least=NOISE,
        )
        for step in STEPS
    ] + [
        bar(
            "every row where ours is F.conv2d itself, so that they differ by 5 us and the machine's noise",
            [r for r in rows if r["is_stock"]],
            _same,
            at_least=NOISE,
        )
    ]


def _same_bits(rows: Sequence[Any]) -> Bar:
    return bar(
        "weight gradient the same to the bit on two runs (1: yes)",
        [r for r in rows if "same_bits" in r],
        lambda r: float(r["same_bits"]),
        at_least=1,
    )
