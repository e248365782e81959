"""What autocast means for operators that choose their own precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Return a block in which x's device computes in the dtypes given (the meta device knows no autocast)."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a convolution of x is to be computed: autocast's where it is on, else x's own."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
