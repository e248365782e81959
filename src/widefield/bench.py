"""Measure callables against each other: rows of time and memory, medians of interleaved runs.

Machines drift while they measure. Candidates therefore take turns, round after round, and what is reported of them
together are ratios within one run.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from widefield import _checks


@dataclass(frozen=True)
class Row:
    """Wall-clock seconds of one call: 20th, 50th and 80th percentile. ``peak_bytes`` is known on CUDA devices only."""

    name: str
    p20: float
    p50: float
    p80: float
    repeats: int
    peak_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dictionary."""
        return asdict(self)


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 9,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, Row]:
    """Time each candidate ``repeats`` times, taking turns, after ``warmup`` untimed rounds.

    Args:
        candidates: name -> callable without arguments; its result is dropped.
        repeats: timed calls of each candidate.
        warmup: untimed calls of each before the first timed round.
        device: on "cuda" every call is followed by a synchronisation, and peak memory is recorded.

    Raises:
        ValueError: no candidates, or counts out of range.
    """
    if not candidates:
        raise ValueError("nothing to measure: candidates is empty.")
    repeats = _checks.integer("repeats", repeats)
    on_cuda = torch.device(device).type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    peaks: dict[str, int] = {}
    for turn in range(_checks.integer("warmup", warmup, minimum=0) + repeats):
        for name, call in candidates.items():
            if on_cuda:
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            call()
            if on_cuda:
                torch.cuda.synchronize(device)
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
                if on_cuda:
                    peaks[name] = torch.cuda.max_memory_allocated(device)
    return {name: _row(name, times, peaks.get(name)) for name, times in seconds.items()}


def _row(name: str, times: list[float], peak: int | None) -> Row:
    p20, p50, p80 = torch.tensor(times, dtype=torch.double).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return Row(name, p20, p50, p80, len(times), peak)


@dataclass(frozen=True)
class Cost:
    """What a model costs whatever machine it runs on."""

    parameters: int
    macs: int
    """Multiply-accumulates of convolutions and matrix products in one forward pass."""


def cost(model: nn.Module, x: Tensor) -> Cost:
    """Count parameters, and multiply-accumulates of a forward pass on ``x``; both may be on the meta device.

    Counted are convolutions and matrix products, as torch's FlopCounterMode sees them, at half its FLOPs. On real
    numbers hard routing is charged for the experts that it chose; on meta tensors for the largest.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Say what a measurement was made on: processor, threads, versions and the date (UTC)."""
    packages = {}
    for package in ("widefield", "torch", "torchvision", "timm"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    on_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else _processor(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "python": platform.python_version(),
        **packages,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
