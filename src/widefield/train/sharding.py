"""Shard weights, gradients and optimizer state over processes with torch's fully sharded data parallel."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
_PRECISION = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Sharded:
    """A model whose parameters are sharded over all processes, block by block and in place.

    Every process keeps an unsharded copy in main memory, which receives the weights for checkpoints. All processes must
    call all methods.

    Args:
        model: on its device, the same in all processes.
        precision: of the computation: "no", "bf16" or "fp16"; weights and reductions stay in float32.
    """

    def __init__(self, model: nn.Module, precision: str) -> None:
        self._whole = copy.deepcopy(model).cpu()
        policy = MixedPrecisionPolicy(param_dtype=_PRECISION[precision], reduce_dtype=torch.float32)
        self._parts: list[Any] = [fully_shard(part, mp_policy=policy) for part in _blocks(model)]
        self.model: Any = fully_shard(model, mp_policy=policy)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep all weights in every process, which may then call the model as often as its own share needs.

        No gradients and no training inside. The processes wait for each other at the beginning and at the end.
        """
        for part in self._parts:
            part.set_reshard_after_forward(False, recurse=False)
        for part in (self.model, *self._parts):
            part.unshard()
        try:
            yield
        finally:
            for part in self._parts:
                part.set_reshard_after_forward(True, recurse=False)
            for part in (self.model, *self._parts):
                part.reshard()

    def whole(self) -> nn.Module:
        """Return the unsharded copy with the current weights."""
        weights = get_model_state_dict(self.model, options=_WHOLE)
        if weights:  # the first process has them
            self._whole.load_state_dict(weights)
        return self._whole

    def target(self) -> nn.Module:
        """Return the unsharded copy, to load weights into before :meth:`spread`."""
        return self._whole

    def spread(self) -> None:
        """Load the weights of the copy into the shards."""
        set_model_state_dict(self.model, self._whole.state_dict(), options=_SPREAD)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the unsharded state of an optimizer by the parameters' names."""
        return dict(get_optimizer_state_dict(self.model, optimizer, options=_WHOLE))

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Load what :meth:`optimizer_state` returned."""
        set_optimizer_state_dict(self.model, optimizer, state, options=_SPREAD)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model: members of its lists and sequences that have children but no blocks inside.

    A shard is gathered when its module is called. Lists are never called, so they are not blocks.
    """

    def holds_blocks(module: nn.Module) -> bool:
        return isinstance(module, (nn.ModuleList, nn.Sequential)) and any(any(c.children()) for c in module.children())

    members = (child for module in model.modules() if holds_blocks(module) for child in module.children())
    return [
        child
        for child in dict.fromkeys(members)
        if any(child.children())
        and any(True for _ in child.parameters())
        and not isinstance(child, nn.ModuleList)
        and not any(holds_blocks(part) for part in child.modules())
    ]
