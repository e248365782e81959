"""Define the contract of ``fuse()``, and fold a norm into the layer before it.

Every ``fuse()`` returns a module that computes what the layer computes in evaluation mode, and every one

- raises RuntimeError in training mode;
- leaves the layer unchanged, and returns a module in evaluation mode that shares no tensor with it;
- returns parameters that require gradients if a parameter that they are computed from does. Norms do not count: their
  scale and shift go with the kernel that they are folded into.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar, cast

import torch
from timm.layers import FrozenBatchNormAct2d
from timm.layers.norm_act import FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from widefield.ops import fold

FROZEN_NORMS = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
"""Batch norms of torchvision and timm that compute the same in training and evaluation mode."""

_Conv = TypeVar("_Conv", bound=nn.Module)


def refuse_training(module: nn.Module) -> None:
    """Raise RuntimeError for a layer in training mode. The mode of a frozen norm does not count."""
    if module.training and not isinstance(module, FROZEN_NORMS):
        raise RuntimeError(
            f"fuse() keeps what a layer computes in evaluation mode, and this {type(module).__name__} is in training "
            "mode: call model.eval() first."
        )


def learns(parameters: Iterable[Tensor | None]) -> bool:
    """Return whether what is computed from these parameters requires gradients in a fused module."""
    return any(parameter is not None and parameter.requires_grad for parameter in parameters)


def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return (scale, shift), each (C,) and in the norm's dtype, such that ``norm`` evaluates to ``scale * x + shift``.

    Raises:
        RuntimeError: in training mode.
        ValueError: no running statistics.
    """
    scale, shift = exact_affine(norm)
    dtype = cast(Tensor, norm.running_mean).dtype
    return scale.to(dtype), shift.to(dtype)


@torch.no_grad()
def fold_norm(conv: _Conv, norm: nn.Module | None) -> _Conv:
    """Fold ``norm`` into ``conv``: return a layer of the same kind that computes both in evaluation mode.

    It has a bias. Its parameters are new: they are computed in float64 and rounded once, or copied if there is no norm.

    Args:
        conv: a convolution, transposed or not, of any number of dimensions and groups, or a linear layer. It must use
            its ``weight`` unchanged.
        norm: a batch norm, frozen or not, or None.

    Raises:
        RuntimeError: one of the two is in training mode.
        ValueError: ``norm`` has no running statistics, or another number of channels.
    """
    refuse_training(conv)
    old: Any = conv
    outputs = conv.out_features if isinstance(conv, nn.Linear) else old.out_channels
    if norm is None:
        weight, bias = old.weight.clone(), None if old.bias is None else old.bias.clone()
    else:
        scale, shift = exact_affine(norm)
        if len(scale) != outputs:
            raise ValueError(f"cannot fold a batch norm of {len(scale)} channels into {outputs} outputs.")
        transposed = old.groups if isinstance(conv, _ConvTransposeNd) else None
        weight, bias = fold.scale_outputs(old.weight, old.bias, scale, shift, transposed=transposed)
    if bias is None:
        bias = weight.new_zeros(outputs)
    bias_learns = learns([old.weight if old.bias is None else old.bias])
    parameters = nn.Parameter(weight, learns([old.weight])), nn.Parameter(bias, bias_learns)
    known = {id(old.weight): parameters[0]}  # subclasses may hold more: copy all of it but the old parameters
    if old.bias is not None:
        known[id(old.bias)] = parameters[1]
    twin: Any = copy.deepcopy(conv, known)
    twin.weight, twin.bias = parameters
    return twin  # type: ignore[no-any-return]


@torch.no_grad()
def add_parameter(total: Tensor, part: Tensor, value: Tensor | None = None) -> None:
    """Add ``part``, or a ``value`` made from it, to a parameter of a fused module."""
    total.add_(part if value is None else value)
    total.requires_grad_(learns([total, part]))


def exact_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return (scale, shift) of a batch norm in evaluation mode, frozen or not; see :func:`fold.batch_norm_affine`."""
    refuse_training(norm)
    bn: Any = norm
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("cannot fold a batch norm without running statistics (track_running_stats=False).")
    return fold.batch_norm_affine(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
