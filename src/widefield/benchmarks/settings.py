"""Define the measurement settings of all benchmarks, and measure the machine's upper limits."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from widefield import _checks, bench

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("cpu", "cuda")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}

_SHORTEST_S = {"cpu": 3e-3, "cuda": 2e-3}
_WARMUP = {"cpu": 1, "cuda": 3}
"""Untimed rounds. On CUDA devices the first ones compile and tune."""


@functools.cache
def keep_freed_memory() -> bool:
    """Make the C library keep freed memory, as allocators for long runs do; return whether that succeeded.

    By default glibc returns large blocks to the system, and the next call pays for new pages. That takes up to ten
    times as long as a short call, depending on the previous measurements.
    """
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return bool(mallopt(mmap_threshold, 32 << 20) and mallopt(trim_threshold, 2**31 - 1))


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    Args:
        command: the command line, which is recorded.
        device: "cpu" or "cuda".
        dtype: "float32", "bfloat16" or "float16".
        repeats: timings of each call.
        budget_s: timed seconds per call; slower calls are timed less often, but at least twice.
        out: folder for the files, or None.
        finished: called with all that was measured, as it stands in the JSON file.

    Raises:
        ValueError: unknown device or dtype, no CUDA device, or numbers out of range.
        OSError: ``out`` cannot be created; checked before anything is measured.
    """

    command: str
    device: str = "cpu"
    dtype: str = "float32"
    repeats: int = 7
    budget_s: float = 0.6
    out: Path | None = None
    finished: Callable[[dict[str, Any]], object] | None = None

    def __post_init__(self) -> None:
        _checks.choice("device", self.device, DEVICES)
        _checks.choice("dtype", self.dtype, tuple(DTYPES))
        _checks.integer("repeats", self.repeats)
        _checks.number("budget_s", self.budget_s)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda' was asked for, but torch sees no CUDA device. Leave it out to use the CPU.")
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch.dtype."""
        return DTYPES[self.dtype]

    @property
    def slug(self) -> str:
        """Suffix of file names for this device and dtype, such as ``cpu`` or ``cuda_bf16``."""
        short = {"float32": "", "bfloat16": "_bf16", "float16": "_fp16"}
        return self.device + short[self.dtype]

    def measure(self, calls: Mapping[str, Callable[[], object]], *, more: int = 1) -> dict[str, bench.Row]:
        """Measure calls, interleaved: seconds per call, and on CUDA devices its memory.

        Args:
            calls: name -> call.
            more: factor of the number of timings and of the time budget.
        """
        keep_freed_memory()
        return bench.measure(
            calls,
            repeats=more * self.repeats,
            warmup=_WARMUP[self.device],
            device=self.device,
            budget_s=more * self.budget_s,
            shortest_s=_SHORTEST_S[self.device],
        )


@dataclass(frozen=True)
class Ceilings:
    """Upper limits of this machine, measured in the same run; they bound the speed of any convolution."""

    gemm_flops: float
    """Floating-point operations per second of a large square matrix product, in the dtype of the rows."""
    copy_bytes: float
    """Bytes per second, read and written, of a copy larger than every cache."""

    def __str__(self) -> str:
        return f"matrix product {self.gemm_flops / 1e9:.0f} GFLOP/s, copy {self.copy_bytes / 1e9:.1f} GB/s"


def ceilings(settings: Settings, *, side: int | None = None, copy_bytes: int | None = None) -> Ceilings:
    """Measure a matrix product of ``side`` squared and a copy of ``copy_bytes``; defaults depend on the device.

    On CPUs the product is always in float32, the dtype in which 16-bit convolutions are computed there.
    """
    on_cpu = settings.device == "cpu"
    side = side or (2048 if on_cpu else 8192)
    dtype = torch.float32 if on_cpu else settings.torch_dtype
    a, b = (torch.randn(side, side, device=settings.device).to(dtype) for _ in range(2))
    size = copy_bytes or (1 << 28 if on_cpu else 1 << 31)
    source = torch.ones(size, dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    rows = settings.measure({"gemm": lambda: a @ b, "copy": lambda: target.copy_(source)})
    return Ceilings(2 * side**3 / rows["gemm"].p50, 2 * size / rows["copy"].p50)
