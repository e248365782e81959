"""Define the sizes at which CPU backends switch algorithms; results do not depend on them, except for rounding."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Measured on Zen 4 and Cascade Lake; see benchmarks/results/depthwise_cpu.md."""

    cached: int = 2**17
    """Taps of all channels above which channels are computed in groups: 512 KiB, half of a second-level cache."""
    slab: int = 500_000
    """Numbers of x that one call of the weight gradient takes: about what a core's cache holds next to its kernels."""
    at_once: int = 200_000
    """Numbers of a sample from which, up to ``slab``, the weight gradient moves the whole batch to channels_last."""
    each: int = 100_000
    """Numbers of a sample below which a loop over samples with their own kernels costs more than moving to NCHW."""
    few: int = 16_000
    """The same where all samples share their kernels, for the weight gradient."""
    pixels: int = 400
    """Pixels of a map below which computing channels in groups costs more than it saves."""
    threes: int = 100_000
    """Numbers of x from which the weight gradient in channels_last is computed three columns at a time."""
    threes_of_few: int = 1_000_000
    """The same for fewer than four samples."""
    transformed: int = 2**17
    """Numbers of padded maps that a thread transforms at once: with spectrum and product about 2 MiB. Half of it would
    stay in a core's own cache, but costs more in calls than that saves.
    """
    spectra: float = 1.0
    """Factor on what transforms cost compared with multiply-adds."""


LIMITS = Limits()
"""The limits in use."""
