"""Measure time and memory of DCNv3's sampling at InternImage-T's stages (``widefield bench deform``).

Ours is :func:`widefield.ops.deform.dcnv3`. It is compared, on the same tensors, with three implementations without a
dedicated operator:

- ``gather``: indexing and arithmetic, the other backend of ours.
- ``grid_sample``: ``F.grid_sample`` on a batch of groups and a sum over points, as the PyTorch version in the paper's
  repository does.
- ``deform_conv2d``: ``torchvision.ops.deform_conv2d`` with kernels of ones, which is compiled, for CPUs and CUDA.

Passes:

- ``forward``: under ``torch.no_grad()``.
- ``backward``: ``torch.autograd.grad`` of a graph built beforehand and retained, all three gradients.

The memory of a pass is its peak, results included and inputs excluded. The memory kept between the passes is that of
the graph, without inputs and output. On CPUs PyTorch's profiler counts it. Ratios are a peer's over ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from widefield import _checks
from widefield.benchmarks import record
from widefield.benchmarks.record import Bar, Record, Row, bar
from widefield.benchmarks.settings import Settings
from widefield.ops.deform import dcnv3

STEPS = ("forward", "backward")
GROUP = 16
"""Channels per group."""
POINTS = 9
NOISE = 0.95
"""Smallest ratio that counts as not slower: timings of equal calls differ by a few percent."""

Op = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One call: a map (batch, side, side, channels), 3x3 points, groups of 16 channels, offsets of about a pixel."""

    batch: int
    channels: int
    side: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.batch} x {self.side}x{self.side} x {self.channels}"

    def tensors(self) -> tuple[list[Tensor], Tensor]:
        """Return [x, offset, mask] and the gradient of an output, drawn with a fixed seed."""
        generator = torch.Generator().manual_seed(0)

        def draw(channels: int) -> Tensor:
            return torch.randn(self.batch, self.side, self.side, channels, generator=generator)

        count = self.channels // GROUP * POINTS
        mask = draw(count).unflatten(-1, (-1, POINTS)).softmax(-1).flatten(-2)
        x, offset, mask, grad = (
            t.to(self.device, self.dtype) for t in (draw(self.channels), draw(2 * count), mask, draw(self.channels))
        )
        return [x, offset, mask], grad


def ours(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """Run our operator with ``backend="auto"``."""
    return dcnv3(x, offset, mask, groups=x.shape[-1] // GROUP)


def gather(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """Run our operator's other backend: indexing and arithmetic."""
    return dcnv3(x, offset, mask, groups=x.shape[-1] // GROUP, backend="gather")


def grid_sample(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """Sample all points of all groups with ``F.grid_sample``, then sum them weighted by the mask."""
    batch, height, width, channels = x.shape
    groups = channels // GROUP
    points = offset.unflatten(-1, (groups, POINTS, 2))
    taps = torch.arange(-1, 2, device=x.device)
    columns = torch.arange(width, device=x.device)[:, None, None] + taps.repeat_interleave(3) + points[..., 0]
    rows = torch.arange(height, device=x.device)[:, None, None, None] + taps.repeat(3) + points[..., 1]
    grid = torch.stack(((2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1), -1)
    grid = grid.permute(0, 3, 1, 2, 4, 5).reshape(batch * groups, height * width, POINTS, 2)
    maps = x.permute(0, 3, 1, 2).reshape(batch * groups, GROUP, height, width)
    sampled = F.grid_sample(maps, grid, align_corners=False)
    weights = mask.unflatten(-1, (groups, POINTS)).permute(0, 3, 1, 2, 4).reshape(batch * groups, 1, -1, POINTS)
    y: Tensor = (sampled * weights).sum(-1).view(batch, channels, height, width)
    return y.permute(0, 2, 3, 1)


def deform_conv2d(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """Sample with torchvision's operator and depthwise kernels of ones.

    Its offsets have rows before columns, and its points are ordered by rows.
    """
    from torchvision.ops import deform_conv2d as operator

    channels = x.shape[-1]
    points = offset.unflatten(-1, (-1, 3, 3, 2)).flip(-1).permute(0, 3, 5, 4, 6, 1, 2).flatten(1, 4)
    weights = mask.unflatten(-1, (-1, 3, 3)).permute(0, 3, 5, 4, 1, 2).flatten(1, 3)
    ones = x.new_ones(channels, 1, 3, 3)
    y: Tensor = operator(x.permute(0, 3, 1, 2), points, ones, padding=1, mask=weights)
    return y.permute(0, 2, 3, 1)


PEERS: dict[str, Op] = {"ours": ours, "gather": gather, "grid_sample": grid_sample, "deform_conv2d": deform_conv2d}
OTHERS = tuple(PEERS)[1:]


def in_32_bits(op: Op) -> Op:
    """Return ``op`` wrapped to compute in float32, as a user would do for an operator without 16-bit support."""

    def run(*tensors: Tensor) -> Tensor:
        return op(*(tensor.float() for tensor in tensors)).to(tensors[0].dtype)

    return run


def peers(case: Case) -> dict[str, Op]:
    """Return the peers; those that do not support 16 bits, or lose the points' positions in them, use float32."""
    if case.dtype == torch.float32:
        return PEERS
    return {name: op if name in ("ours", "gather") else in_32_bits(op) for name, op in PEERS.items()}


def calls(case: Case, step: str) -> dict[str, Callable[[], object]]:
    """Return peer -> a call of one pass."""
    return {name: _call(op, case, step) for name, op in peers(case).items()}


def _call(op: Op, case: Case, step: str) -> Callable[[], object]:
    tensors, grad = case.tensors()
    if step == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                y: Tensor = op(*tensors)
                return y

        return forward
    leaves = [tensor.requires_grad_() for tensor in tensors]
    edge = get_gradient_edge(op(*leaves))  # an edge does not keep outputs alive
    return lambda: torch.autograd.grad(edge, leaves, grad, retain_graph=True)


def held(call: Callable[[], object], device: str) -> tuple[int, int]:
    """Return the bytes that a call allocates: at its peak, and those still held by its result."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        del result
        return found
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler logs its start and end to stderr
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profile:
        result = call()
    found_events = getattr(profile, "kineto_results").events()  # noqa: B009  private, and None before
    events = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(found_events) if e.name() == "[memory]")
    now = peak = 0
    for _, _, size in events:
        now += size
        peak = max(peak, now)
    del result
    return peak, now


def kept(op: Op, case: Case) -> int:
    """Return the bytes that the graph of a call keeps, without inputs and output."""
    tensors, grad = case.tensors()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    return max(0, held(lambda: op(*leaves), case.device)[1] - grad.nbytes)


def time_row(case: Case, step: str, settings: Settings) -> Row:
    """Measure the time of one pass of all peers, interleaved."""
    measured = settings.measure(calls(case, step))
    return {
        **_about(case, step),
        "times": record.times(measured),
        "ratios": {name: measured[name].p50 / measured["ours"].p50 for name in OTHERS},
    }


def memory_row(case: Case, step: str) -> Row:
    """Measure each peer's peak memory in one pass, or the memory between the passes with ``step="kept"``."""
    if step == "kept":
        found = {name: kept(op, case) for name, op in peers(case).items()}
    else:
        found = {name: held(call, case.device)[0] for name, call in calls(case, step).items()}
    mine = found["ours"]
    return {**_about(case, step), "bytes": found, "ratios": {n: found[n] / mine if mine else None for n in OTHERS}}


def _about(case: Case, step: str) -> Row:
    return {
        "label": f"{case}, {step}",
        "batch": case.batch,
        "channels": case.channels,
        "side": case.side,
        "groups": case.channels // GROUP,
        "dtype": str(case.dtype).removeprefix("torch."),
        "step": step,
    }


def _columns(unit: str, show: Callable[[Row, str], str]) -> dict[str, Callable[[Row], str]]:
    columns: dict[str, Callable[[Row], str]] = {
        "shape": lambda r: f"{r['batch']} x {r['side']}x{r['side']} x {r['channels']}",
        "step": lambda r: r["step"],
    }
    for name in PEERS:
        columns[f"{name}, {unit}"] = lambda r, name=name: show(r, name)  # type: ignore[misc]
    for name in OTHERS:
        columns[f"{name} / ours"] = lambda r, name=name: _ratio(r["ratios"][name])  # type: ignore[misc]
    return columns


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


TIME = _columns("ms (p20-p80)", lambda r, name: record.milliseconds(r["times"][name]))
MEMORY = _columns("MiB", lambda r, name: f"{r['bytes'][name] / 2**20:.1f}")


def run(
    settings: Settings,
    *,
    batch_size: int = 4,
    side: int = 56,
    width: int = 64,
    stages: Sequence[int] = (1, 2, 3, 4),
) -> list[Bar]:
    """Run the benchmark: print rows, write files to ``settings.out`` and return the bars.

    Args:
        settings: of the measurement.
        batch_size: number of images.
        side: rows and columns of the first stage's map; each later stage has half as many.
        width: channels of the first stage, a multiple of 16; each later stage has twice as many.
        stages: numbers of the stages to measure, from 1.

    Raises:
        TypeError, ValueError: numbers out of range.
    """
    width = _checks.integer("width", width, minimum=GROUP)
    if width % GROUP:
        raise ValueError(f"width must be a multiple of {GROUP}, the channels of a group; got {width}.")
    chosen = [_checks.integer("every entry of stages", stage, maximum=8) - 1 for stage in stages]
    batch_size, side = (
        _checks.integer("batch_size", batch_size),
        _checks.integer("side", side, minimum=1 << max(chosen, default=0)),
    )
    cases = [Case(batch_size, width << i, side >> i, settings.torch_dtype, settings.device) for i in chosen]
    out = Record("deform", settings)
    out.fact("Offsets are normal with a deviation of one pixel. Ratios are a peer's time or memory over ours.")
    time, memory = out.table("Time", TIME), out.table("Memory", MEMORY)
    with out.until_interrupted():
        for case in cases:
            for step in STEPS:
                out.add(time, time_row(case, step, settings))
        for case in cases:
            for step in ("forward", "kept", "backward"):
                out.add(memory, memory_row(case, step))
    bars = _bars(time.rows, memory.rows)
    out.finish(bars)
    return bars


def _bars(times: Sequence[Row], memory: Sequence[Row]) -> list[Bar]:
    def of(name: str) -> Callable[[Any], float]:
        return lambda row: float(row["ratios"][name])

    return [
        *(
            bar(f"{step}: time of {name} / ours", [r for r in times if r["step"] == step], of(name), at_least=NOISE)
            for step in STEPS
            for name in OTHERS
        ),
        *(
            bar(
                f"{step}: memory of grid_sample / ours",
                [r for r in memory if r["step"] == step],
                of("grid_sample"),
                at_least=1,
            )
            for step in STEPS
        ),
    ]
