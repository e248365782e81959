"""Handle autocast for operators that choose their own precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NO_OP: AbstractContextManager[None] = nullcontext()


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Return a context in which operations on x's device keep the dtypes of their inputs."""
    enabled = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if enabled else _NO_OP  # autocast is slow, even when off


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast would compute a convolution of x, or None where it is off."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return None  # the meta device has no autocast
    if not x.is_floating_point() or x.dtype == torch.float64:
        return None  # autocast does not change these
    return torch.get_autocast_dtype(x.device.type)
