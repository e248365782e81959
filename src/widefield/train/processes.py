"""Make decisions that must be the same in all processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor


def largest(accelerator: Accelerator, value: int) -> int:
    """Return the largest value of any process; all of them must call it, or none."""
    if accelerator.num_processes == 1:
        return value
    values: Tensor = accelerator.gather(torch.tensor([value], device=accelerator.device))
    return int(values.max())
