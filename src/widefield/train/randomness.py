"""Save and restore the state of the global random generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the states of the global generators in types that a checkpoint accepts."""
    twister = np.random.get_state(legacy=False)
    words = torch.from_numpy(twister["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {**twister, "state": {**twister["state"], "key": words}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the global generators to what :func:`random_state` returned."""
    twister = state["numpy"]
    words = twister["state"]["key"].numpy().astype(np.uint32)
    random.setstate(state["python"])
    np.random.set_state({**twister, "state": {**twister["state"], "key": words}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
