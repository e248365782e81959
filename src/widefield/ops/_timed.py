"""Choose by timing on CUDA devices: every kind of problem is measured once, and the choice is cached on disk.

For the same choice on every machine, copy the file (:func:`cache_file`), name a backend, or enable
``torch.use_deterministic_algorithms``, under which nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from widefield.ops import _cache
from widefield.ops._problem import Problem

_MARGIN = 0.97
"""Largest share of PyTorch's own time at which another backend is preferred. Smaller differences are noise."""

_memory: dict[Path, dict[str, Any]] = {}


def cache_file(device: torch.device) -> Path:
    """Return the file with the times of a device, in $XDG_CACHE_HOME/widefield, by card and version of PyTorch."""
    versions = (torch.__version__, f"cudnn{torch.backends.cudnn.version()}")
    return _cache.path("backends", torch.cuda.get_device_name(device), *versions)


def may_measure(device: torch.device) -> bool:
    """Return whether timing is allowed: not during CUDA graph capture or with deterministic algorithms."""
    return not (torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing())


def known(key: str, device: torch.device, candidates: Sequence[str]) -> tuple[str, str] | None:
    """Return the winner among ``candidates`` and all times, if they are known. The first candidate is PyTorch's."""
    if torch.are_deterministic_algorithms_enabled():
        return None
    times = _times(device).get(key)
    if not isinstance(times, dict) or not all(isinstance(times.get(name), float) for name in candidates):
        return None  # never measured, or written by something else
    return _winner({name: times[name] for name in candidates})


def measure(key: str, device: torch.device, runs: Mapping[str, Callable[[], object]]) -> tuple[str, str]:
    """Time each run on the device, remember the times under ``key``, and return the winner. The first is PyTorch's."""
    times = {name: _milliseconds(run, device) for name, run in runs.items()}
    _times(device)[key] = times
    _cache.write(cache_file(device), key, times)
    return _winner(times)


def _winner(times: Mapping[str, float]) -> tuple[str, str]:
    best, stock = min(times, key=lambda name: times[name]), next(iter(times))
    if times[best] > _MARGIN * times[stock]:
        best = stock
    return best, "timed: " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in sorted(times.items()))


def key_of(problem: Problem) -> str:
    """Return the key of a problem's times: the batch is rounded up to a power of two, everything else is exact."""
    batch = 1 << (max(problem.batch, 1) - 1).bit_length()
    tf32 = problem.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return " ".join(
        str(part)
        for part in (
            problem.step, batch, problem.channels, problem.height, problem.width, *problem.kernel, *problem.stride,
            *problem.padding, *problem.dilation, problem.per_sample, problem.dtype, problem.channels_last, tf32,
        )
    )  # fmt: skip


def _times(device: torch.device) -> dict[str, Any]:
    file = cache_file(device)
    if file not in _memory:
        _memory[file] = _cache.read(file)
    return _memory[file]


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median of five calls, after two that compile and tune."""
    times = []
    for turn in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        if turn >= 2:
            times.append(start.elapsed_time(end))
    return float(sorted(times)[len(times) // 2])
