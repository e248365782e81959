"""What autocast means for operators that choose their own precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Return a block in which x's device computes in the dtypes given."""
    enabled = not x.is_meta and torch.is_autocast_enabled(x.device.type)  # switching off what is off takes time, too
    return torch.autocast(x.device.type, enabled=False) if enabled else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast would compute a convolution of x, or None where it is off."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return None  # the meta device knows no autocast
    if not x.is_floating_point() or x.dtype == torch.float64:
        return None  # autocast leaves these alone
    return torch.get_autocast_dtype(x.device.type)
