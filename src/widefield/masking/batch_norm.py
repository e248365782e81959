"""Batch norms whose statistics are over visible positions, in two forms: of all positions, and of the visible rows."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from widefield.masking.visibility import Forward, Visibility


def batch_norm(module: Any, visible: Visibility, forward: Forward, x: Tensor) -> Tensor:
    """Normalize visible positions by their own statistics in training mode; values at masked ones are arbitrary.

    Args:
        module: a batch norm.
        visible: the mask.
        forward: what the module computes without one.
        x: (N, C, H, W).
    """
    if not module.training and getattr(module, "running_mean", None) is not None:
        return forward(x)
    if _is_plain(module, x):
        return _over_all_positions(module, visible, x)
    rows = visible.rows(x)
    return _laid_out(_Placed.apply(forward(_Taken.apply(x, rows)), rows, x.shape), x)


def _is_plain(module: nn.Module, x: Tensor) -> bool:
    """Return whether the form over all positions applies: it is faster unless channels are stored last.

    Statistics of half precision would be sums in half precision there.
    """
    return (
        type(module) in (nn.BatchNorm2d, BatchNormAct2d)
        and not x.is_contiguous(memory_format=torch.channels_last)
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _over_all_positions(module: Any, visible: Visibility, x: Tensor) -> Tensor:
    """Compute a plain batch norm of timm or PyTorch."""
    count = visible.count(x)
    weight = x.new_ones(x.shape[1]) if module.weight is None else module.weight
    bias = x.new_zeros(x.shape[1]) if module.bias is None else module.bias
    y, mean, variance = _Normalized.apply(x, weight, bias, visible.at(x), count, module.eps)
    if module.running_mean is not None:
        module.num_batches_tracked.add_(1)
        share = 1.0 / module.num_batches_tracked if module.momentum is None else module.momentum
        for running, new in ((module.running_mean, mean), (module.running_var, variance)):
            running.mul_(1 - share).add_(share * new)
    for name in ("drop", "act"):  # of timm's norms with an activation
        y = getattr(module, name, nn.Identity())(y)
    out: Tensor = y
    return out


class _Normalized(torch.autograd.Function):
    """A batch norm by the statistics of visible positions, (N, C, H, W) -> the same, their mean and variance.

    With the visible mean v at masked positions, PyTorch's own batch norm finds the mean v, and a variance that is too
    small by the share s of visible positions; ``eps * s`` and ``weight * sqrt(s)`` make up for that. The output at
    masked positions is a constant.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, seen: Tensor, count: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        positions = x.numel() // x.shape[1]
        share = count / positions
        mean = _visible_sum(x, seen) / count
        x = torch.where(seen > 0, x, mean[:, None, None])
        scaled = weight * share**0.5
        mean, variance = torch.zeros_like(weight), torch.zeros_like(weight)
        y, *saved = torch.native_batch_norm(x, scaled, bias, mean, variance, True, 1.0, eps * share)
        ctx.save_for_backward(x, scaled, seen, *saved)
        ctx.count, ctx.share, ctx.eps = count, share, eps * share
        variance = variance * ((positions - 1) / (count - 1))
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        x, scaled, seen, mean, deviation = ctx.saved_tensors
        of_x, of_weight, everywhere = torch.ops.aten.native_batch_norm_backward(
            grad, x, scaled, None, None, mean, deviation, True, ctx.eps, [True, True, True]
        )
        of_bias = _visible_sum(grad, seen)
        # It subtracted the mean of the gradient over all positions instead of that over visible ones.
        rest = scaled * deviation * (everywhere * ctx.share - of_bias) / ctx.count
        of_x.add_(rest[:, None, None]).mul_(seen)
        return of_x, of_weight * ctx.share**0.5, of_bias, None, None, None


def _visible_sum(x: Tensor, seen: Tensor) -> Tensor:
    """Return the sum over visible positions of a map, (N, C, H, W) -> (C,)."""
    total: Tensor = (x.flatten(2) @ seen.flatten(2).mT).sum((0, 2))
    return total


def _rows_of(x: Tensor) -> Tensor:
    """Return a map (N, C, H, W) as a matrix with a row for each position: a view if channels are stored last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class _Taken(torch.autograd.Function):
    """Some positions of a map, (N, C, H, W) -> (1, C, rows, 1); the transpose of :class:`_Placed`.

    The shapes are changed inside, so that what follows may work in place: on a view, autograd would copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        # One image, one column, channels last: other strides of these axes give wrong gradients in batch norms
        # (PyTorch 2.14, CPU).
        return _rows_of(x).index_select(0, rows).view(1, len(rows), 1, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _Placed.apply(grad, rows, ctx.shape), None


class _Placed(torch.autograd.Function):
    """Positions at their places of a map of zeros, (1, C, rows, 1) -> (N, C, H, W), stored channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(rows)
        placed = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).zero_()
        _rows_of(placed).index_copy_(0, rows, _rows_of(x))
        return placed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return _Taken.apply(grad, rows), None, None


def _laid_out(y: Tensor, like: Tensor) -> Tensor:
    """Return a map in the memory format of another."""
    last = like.is_contiguous(memory_format=torch.channels_last)
    return y if last else y.contiguous()
