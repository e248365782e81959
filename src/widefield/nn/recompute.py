"""Recompute blocks in the backward pass instead of keeping their activations (gradient checkpointing).

Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016. Random numbers are those of the first
forward pass, as PyTorch restores the generators' state. The second forward pass also must not change the state that the
first one has changed; :class:`Recomputing` sees to that.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


class Recomputing(AbstractContextManager[None]):
    """Let a model be called again without another effect than the first call's. May be entered repeatedly.

    Batch norms in training mode update copies of their running statistics. A module with state
    of its own, such as the mask of a masked autoencoder, has a method ``recomputing() -> context manager`` that sets it
    as it was in the last call.

    Networks of widefield do this by themselves after ``set_grad_checkpointing()``. The batch norms of timm's other
    networks see every batch twice, unless the backward pass runs inside::

        with Recomputing(model):
            loss.backward()

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._stacks: list[ExitStack] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        for module in self._model.modules():
            if isinstance(module, _NormBase) and module.training:
                own = dict(module._buffers)
                stack.callback(module._buffers.update, own)
                module._buffers.update({name: None if x is None else x.clone() for name, x in own.items()})
            state = getattr(module, "recomputing", None)
            if callable(state):
                stack.enter_context(state())
        self._stacks.append(stack)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stacks.pop().close()


def recomputed(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Run blocks one after the other, each of which keeps only its input and is run again in the backward pass."""
    for block in blocks:
        x = _recomputed(block, x)
    return x


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # a compiled graph has one update of the statistics, whatever it recomputes
        y: Tensor = checkpoint(block, x, use_reentrant=False)
    else:
        y = checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), Recomputing(block)))
    return y


class Blocks(nn.Sequential):
    """A ``torch.nn.Sequential`` of blocks that are recomputed in training if ``grad_checkpointing`` is set."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks; the input is that of the first, the output that of the last."""
        if self.grad_checkpointing and self.training:
            return recomputed(self, x)
        for block in self:
            x = block(x)
        return x
