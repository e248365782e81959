"""Timed choices on CUDA devices: every kind of problem is measured once, and the winner remembered on disk.

Whoever wants the same choice on every run keeps the file (``cache_file()``), names a backend, or switches
``torch.use_deterministic_algorithms`` on, under which nothing is timed.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from widefield.ops._problem import Problem

_MARGIN = 0.97
"""How much of PyTorch's own time another backend may take at most to be preferred: less is noise."""

_memory: dict[str, dict[str, dict[str, float]]] = {}


def cache_file(device: torch.device) -> Path:
    """Return where the times for a device lie: $XDG_CACHE_HOME/widefield, by card and version of PyTorch."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    card = torch.cuda.get_device_name(device).replace(" ", "_").replace("/", "_")
    return root / "widefield" / f"depthwise-{card}-torch{torch.__version__}-cudnn{torch.backends.cudnn.version()}.json"


def may_measure(device: torch.device) -> bool:
    """Say whether timing is allowed now: not while a CUDA graph is captured, nor where determinism is asked for."""
    return not (torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing())


def known(problem: Problem, candidates: Sequence[str]) -> tuple[str, str] | None:
    """Return the winner among ``candidates`` and its times, if they have been measured before."""
    if torch.are_deterministic_algorithms_enabled():
        return None
    times = _times(problem.device).get(_key(problem))
    if times is None or not set(candidates) <= set(times):
        return None
    return _winner({name: times[name] for name in candidates})


def measure(problem: Problem, runs: Mapping[str, Callable[[], object]]) -> tuple[str, str]:
    """Time each run on the problem's device, remember the times, and return the winner."""
    times = {name: _milliseconds(run, problem.device) for name, run in runs.items()}
    store = _times(problem.device)
    store[_key(problem)] = times
    _write(cache_file(problem.device), store)
    return _winner(times)


def _winner(times: Mapping[str, float]) -> tuple[str, str]:
    best = min(times, key=lambda name: times[name])
    if times[best] > _MARGIN * times["aten"]:
        best = "aten"
    return best, "timed: " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in sorted(times.items()))


def _key(problem: Problem) -> str:
    """Batches are told apart by their power of two only, everything else exactly."""
    batch = 1 << (max(problem.batch, 1) - 1).bit_length()
    tf32 = problem.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return " ".join(
        str(part)
        for part in (
            problem.step, batch, problem.channels, problem.height, problem.width, *problem.kernel, *problem.stride,
            *problem.padding, *problem.dilation, problem.per_sample, problem.dtype, problem.channels_last, tf32,
        )
    )  # fmt: skip


def _times(device: torch.device) -> dict[str, dict[str, float]]:
    path = cache_file(device)
    if str(path) not in _memory:
        try:
            loaded = json.loads(path.read_text())
        except (OSError, ValueError):
            loaded = {}
        _memory[str(path)] = loaded if isinstance(loaded, dict) else {}
    return _memory[str(path)]


def _write(path: Path, store: dict[str, dict[str, float]]) -> None:
    """Replace the file as a whole; a cache that cannot be written is measured again next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(store, file)
        Path(file.name).replace(path)


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median of five calls after two that compile and tune."""
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
