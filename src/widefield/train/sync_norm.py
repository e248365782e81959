"""Batch norms over the batches of all processes, on GPUs and on CPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widefield.masking.visibility import Treated


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total


class SyncBatchNormOnCPU(_BatchNorm):
    """A batch norm over the batches of all processes, in plain PyTorch; PyTorch's own refuses CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape."""
        y = self._in_training(x) if self.training else self._in_evaluation(x)
        for name in ("drop", "act"):  # of timm's norms with an activation
            y = getattr(self, name)(y) if hasattr(self, name) else y
        return y

    def _in_evaluation(self, x: Tensor) -> Tensor:
        alone = self.running_mean is None  # as PyTorch's, it then normalizes by the batch of its own process
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, alone, 0.0, self.eps)

    def _in_training(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        count = wide.new_tensor(x.numel() / x.shape[1])
        torch.distributed.all_reduce(count)
        mean = _Sum.apply(wide.sum(axes)) / count
        centered = wide - mean.view(shape)
        var = _Sum.apply(centered.square().sum(axes)) / count
        self._track(mean.detach(), var.detach() * (count / (count - 1)))
        y = centered * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        result: Tensor = y.to(x.dtype)
        return result

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Update the running statistics; ``var`` is unbiased."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(var.to(self.running_var.dtype), share)


def synchronized(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a model whose batch norms use the batches of all processes; names of its entries stay the same."""
    if device.type != "cpu":
        rules = {name: module.forward for name, module in model.named_modules() if isinstance(module.forward, Treated)}
        converted: nn.Module = convert_sync_batchnorm(model)
        for name, old in rules.items():  # those of masked pre-training; the new norms are other modules
            module = converted.get_submodule(name)
            module.forward = Treated(module, old.visibility, old.rule)
        return converted
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = SyncBatchNormOnCPU  # the same state, another forward pass
    return model
