"""Register the fake implementations of our operators: shapes, dtypes and layouts without numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

# torch asks inspect which module registers. For that, inspect resolves the paths of all loaded modules, which takes
# longer than all our imports together. This is the answer for this file.
inspect.modulesbyfile.setdefault(__file__, __name__)


def register_fake(name: str, fake: Callable[..., Any], library: torch.library.Library) -> None:
    """Register the fake implementation of ``widefield::name``, which is defined in this library."""
    torch.library.register_fake(f"widefield::{name}", fake, lib=library)
