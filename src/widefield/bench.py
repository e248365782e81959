"""Time callables against each other: interleaved runs, medians, peak memory.

Machines drift during a measurement, so candidates take turns, and results are compared as ratios within one run.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from widefield import _checks
from widefield.report import Report

_MOST_CALLS = 1000
"""Largest number of calls in one timing."""


@dataclass(frozen=True)
class Row:
    """Wall-clock seconds of one call: 20th, 50th and 80th percentile."""

    name: str
    p20: float
    p50: float
    p80: float
    repeats: int
    """Number of timings."""
    peak_bytes: int | None = None
    """Peak memory of a call beyond what was allocated before it; CUDA only."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dictionary."""
        return asdict(self)


class Rows(Report, dict[str, Row]):
    """Name of a candidate -> its :class:`Row`; prints and displays as a table."""

    def summary(self) -> str:
        """Return what was measured in one line."""
        return f"Milliseconds of one call, {max((row.repeats for row in self.values()), default=0)} timings at most"

    def rows(self) -> list[dict[str, str]]:
        """Return one row per candidate; ratios are the first candidate's median divided by this one's."""
        first = next(iter(self.values()), None)
        return [
            {
                "name": row.name,
                "median, ms": f"{1e3 * row.p50:.4g}",
                "p20-p80, ms": f"{1e3 * row.p20:.4g} - {1e3 * row.p80:.4g}",
                "speed": "-" if first is None else f"{first.p50 / row.p50:.2f}",
                "peak, MiB": "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
            }
            for row in self.values()
        ]


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 9,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    budget_s: float | None = None,
    shortest_s: float = 0.0,
) -> Rows:
    """Time each candidate ``repeats`` times, taking turns, after ``warmup`` untimed rounds.

    Every other round runs in reverse order, so each candidate follows both of its neighbors; and rounds start with
    different candidates, as those at the ends would otherwise follow themselves.

    Args:
        candidates: name -> callable without arguments; results are dropped.
        repeats: timings per candidate.
        warmup: untimed calls of each candidate before the first timed round.
        device: on "cuda", every timing ends with a synchronization, and peak memory is recorded.
        budget_s: timed seconds after which a candidate skips further rounds; it gets at least two timings. If the last
            warm-up call alone takes longer, it counts as a timing.
        shortest_s: shorter calls are repeated within a timing until it takes about this long. Calls of up to ten times
            that have as many untimed calls before each timing, so that caches left by the previous candidate do not
            matter. Rows state the seconds of one call.

    Returns:
        The rows by name, in the order of the candidates.

    Raises:
        ValueError: no candidates, or counts out of range.
    """
    if not candidates:
        raise ValueError("candidates is empty: give at least one callable to measure.")
    repeats = _checks.integer("repeats", repeats)
    warmup = _checks.integer("warmup", warmup, minimum=0)
    budget = math.inf if budget_s is None else _checks.number("budget_s", budget_s)
    shortest = _checks.number("shortest_s", shortest_s)
    on_cuda = torch.device(device).type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    spent = dict.fromkeys(candidates, 0.0)
    fastest = dict.fromkeys(candidates, math.inf)
    peaks: dict[str, int] = {}
    items = list(candidates.items())
    for turn in range(warmup + repeats):
        first = turn // 2 % len(candidates)
        order = items[first:] + items[:first]
        for name, call in reversed(order) if turn % 2 else order:
            if len(seconds[name]) >= 2 and spent[name] >= budget:
                continue
            calls = 1 if turn < warmup else max(1, min(_MOST_CALLS, math.ceil(shortest / max(fastest[name], 1e-9))))
            for _ in range(calls if turn >= warmup and fastest[name] < 10 * shortest else 0):
                call()
            held = 0
            if on_cuda:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                held = torch.cuda.memory_allocated(device)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            if on_cuda:
                torch.cuda.synchronize(device)
            elapsed = time.perf_counter() - start
            fastest[name] = min(fastest[name], elapsed / calls)
            if turn >= warmup or (turn == warmup - 1 and elapsed > budget):
                spent[name] += elapsed
                seconds[name].append(elapsed / calls)
                if on_cuda:
                    peaks[name] = torch.cuda.max_memory_allocated(device) - held
    return Rows({name: _row(name, times, peaks.get(name)) for name, times in seconds.items()})


def _row(name: str, times: list[float], peak: int | None) -> Row:
    p20, p50, p80 = torch.tensor(times, dtype=torch.double).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return Row(name, p20, p50, p80, len(times), peak)


@dataclass(frozen=True)
class Cost(Report):
    """Costs of a model that do not depend on the machine."""

    parameters: int
    macs: int
    """Multiply-accumulates of convolutions and matrix products in one forward pass."""
    uncounted: tuple[str, ...] = ()
    """Operators that ran but are not in ``macs``, sorted by name: Fourier transforms (``"aten._fft_r2c"``), sampling,
    and operators outside PyTorch without a formula.
    """

    def summary(self) -> str:
        """Return what was counted."""
        return "One forward pass" + (f"; not counted: {', '.join(self.uncounted)}" if self.uncounted else "")

    def rows(self) -> list[dict[str, str]]:
        """Return one row with both counts."""
        return [{"parameters": f"{self.parameters:,}", "multiply-accumulates": f"{self.macs:,}"}]


def cost(model: nn.Module, x: Tensor) -> Cost:
    """Count parameters, and the multiply-accumulates of a forward pass on ``x``; both may be on the meta device.

    Convolutions (torchvision's deformable ones too, without their sampling), matrix products, attention and recurrent
    layers are counted with torch's FlopCounterMode, at half its FLOPs. Counts are the same on all devices, as fused
    layers are counted as what they compute. Elementwise operators, norms and pooling count as zero; other operators are
    listed in the result. With real data, hard routing is charged for the chosen experts; on the meta device, for the
    largest ones.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    seen = _Seen()
    try:
        for parameter in learning:  # the counter's hooks fail on views of these
            parameter.requires_grad_(False)
        with torch.no_grad(), _without_fused_encoders(), seen, counter:
            model(x)
    finally:
        for parameter in learning:
            parameter.requires_grad_()
    uncounted = {str(operator) for operator in seen.operators if operator not in counter.flop_registry}
    return Cost(
        sum(p.numel() for p in model.parameters()),
        counter.get_total_flops() // 2,
        tuple(sorted(filter(_multiplies, uncounted))),
    )


class _Seen(TorchDispatchMode):
    """Collects the operators that run; entered before a counter, it sees decomposed operators."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.add(getattr(func, "overloadpacket", func))
        return func(*args, **(kwargs or {}))


_PRODUCTS = re.compile(
    r"(?<!ga|cu|ha|du)mm|mv_?$|v?dot$|dot_product|conv(?!ert)|attention|encoder_layer|rnn|lstm|gru|fft|trilinear$|matmul"
    r"|linalg_(?!vector_norm|cross|diagonal)|_solve|cholesky|cdist|euclidean_dist|grid_sampler|embedding_bag"
)
"""Names that PyTorch gives operators that multiply and add."""


def _multiplies(operator: str) -> bool:
    """Return whether an operator without a formula may be missing from the count."""
    namespace, _, name = operator.rpartition(".")
    if namespace not in ("aten", "prim", "prims", "profiler"):
        return True
    return bool(_PRODUCTS.search(name)) and "fused_lstm_cell" not in name and "fused_gru_cell" not in name


@contextmanager
def _without_fused_encoders() -> Iterator[None]:
    """Run nn.MultiheadAttention and nn.TransformerEncoderLayer as separate operators, as in training."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _formulas() -> dict[Any, Callable[..., int]]:
    """Return FLOP formulas for operators unknown to FlopCounterMode, from the shapes of their arguments."""
    aten = torch.ops.aten
    formulas: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten.mkldnn_rnn_layer: lambda x, *weights, **_: _recurrent_flops(x, weights[:2]),
        aten._cudnn_rnn: lambda x, weights, *_, **__: _recurrent_flops(x, weights),
        aten.miopen_rnn: lambda x, weights, *_, **__: _recurrent_flops(x, weights),
        aten.mv: lambda a, *_, **__: 2 * math.prod(a),
        aten.addmv: lambda _, a, *__, **___: 2 * math.prod(a),
        aten.dot: lambda a, *_, **__: 2 * math.prod(a),
        aten.vdot: lambda a, *_, **__: 2 * math.prod(a),
        aten._int_mm: lambda a, b, *_, **__: 2 * math.prod(a) * b[-1],
        aten._addmm_activation: lambda _, a, b, *__, **___: 2 * math.prod(a) * b[-1],
        aten.addbmm: lambda _, a, b, *__, **___: 2 * math.prod(a) * b[-1],
    }
    deformable = getattr(torch.ops.torchvision, "deform_conv2d", None)  # exists once torchvision is imported
    if deformable is not None:
        formulas[deformable] = lambda x, weight, *_, out_shape, **__: 2 * math.prod(out_shape) * math.prod(weight[1:])
    return formulas


def _recurrent_flops(x: Sequence[int], weights: Sequence[Sequence[int]]) -> int:
    """Return FLOPs for input (..., features): every matrix multiplies a vector in every step of every sample."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) == 2)


def environment(device: torch.device | str = "cpu", beside: Sequence[str] = ()) -> dict[str, str]:
    """Return what a measurement ran on: processor, threads, versions and the date (UTC).

    Args:
        device: device to name.
        beside: further packages that took part besides PyTorch, torchvision, timm and this one.
    """
    packages = {}
    for package in ("widefield", "torch", "torchvision", "timm", *beside):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    on_cuda = torch.device(device).type == "cuda"
    card = {}
    if on_cuda:
        card = {"cuda": str(torch.version.cuda), "tf32": "yes" if torch.backends.cudnn.allow_tf32 else "no"}
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else _processor(),
        **card,
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "python": platform.python_version(),
        **packages,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    """Return the processor's name, with family and model: virtual machines call several generations by one name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n", 1)[0].splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    if "cpu family" not in facts:
        return facts["model name"]
    return f"{facts['model name']} (family {facts['cpu family']}, model {facts.get('model', 'unknown')})"
