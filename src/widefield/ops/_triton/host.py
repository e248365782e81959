"""Provide helpers for all kernel launchers: sizes, memory formats, precision, unsupported devices."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from widefield._checks import Pair
from widefield.ops._problem import memory_format

# Kernels decorated under TRITON_INTERPRET=1 run on the CPU, slowly; the tests use this.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# Weight gradients are split until there are this many programs. This is a constant, not a property of the device, so
# that partial sums are added in the same order, and results are bitwise equal, on every GPU.
PROGRAMS = 4096


def device_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why kernels for ``dtype`` cannot run on ``device``, or None if they can."""
    if dtype == torch.float64:
        return "sums are kept in float32, too coarse for float64"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{dtype} is none of float32, float16 and bfloat16"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"Triton needs a CUDA device; x is on {device.type}"
    if (found := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"Triton needs compute capability 8.0; the device has {found[0]}.{found[1]}"
    return None


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """Return x without gaps in the given memory format; x itself if it already is."""
    return x.contiguous(memory_format=memory_format(channels_last))


def empty(
    batch: int, channels: int, size: Pair, dtype: torch.dtype, device: torch.device, channels_last: bool
) -> Tensor:
    """Return a new (N, C, H, W) tensor in the given memory format."""
    layout = memory_format(channels_last)
    return torch.empty((batch, channels, *size), dtype=dtype, device=device, memory_format=layout)


def tf32_allowed() -> bool:
    """Return whether the user allows convolutions to round float32 to TF32.

    PyTorch has two interfaces. Reading the old flag raises if the new one has a value that the old cannot express.
    """
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        conv = getattr(torch.backends.cudnn, "conv", None)
        return getattr(conv, "fp32_precision", "ieee") == "tf32"


def even_parts(size: int, at_most: int) -> int:
    """Return the length of parts that split ``size`` evenly into the fewest parts of at most ``at_most``."""
    parts = -(-size // at_most)
    return -(-size // parts)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
