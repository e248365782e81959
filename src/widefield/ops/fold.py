"""Transform convolution kernels exactly: dilate, pad, crop, stack, fold a batch norm.

Every function returns a kernel that computes the same convolution as its input. For :func:`crop` this holds under the
conditions that it documents. Kernels have shape (C_out, C_in/groups, K_h, K_w) with odd K_h and K_w, and any number of
leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield.ops._problem import size_of

_CHUNK = 2**16
"""Numbers of a kernel that are scaled at a time."""


def effective_size(size: int, dilation: int) -> int:
    """Return how many pixels a kernel of ``size`` taps with ``dilation`` spans: ``dilation * (size - 1) + 1``."""
    return dilation * (size - 1) + 1


def dilate(kernel: Tensor, dilation: int) -> Tensor:
    """Return a dilated kernel as a plain one, with ``dilation - 1`` zeros between its taps.

    (..., K_h, K_w) -> (..., d*(K_h-1)+1, d*(K_w-1)+1), same dtype; differentiable.
    """
    if dilation == 1:
        return kernel
    zeros = dilation - 1
    spread = F.pad(kernel[..., None, :, None], (0, zeros, 0, 0, 0, zeros)).flatten(-4, -3).flatten(-2)
    return spread[..., :-zeros, :-zeros]


def pad(kernel: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Pad a kernel with zeros around its center: (..., K_h, K_w) -> (..., rows, columns), all odd; differentiable.

    ``size``: (rows, columns), no less than the kernel's, or one number for both.
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    down, right = (rows - size_of(kernel)[-2]) // 2, (columns - size_of(kernel)[-1]) // 2
    return torch.constant_pad_nd(kernel, (right, right, down, down)) if down or right else kernel


def fit(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """Crop or pad a kernel around its center: (..., K_h, K_w) -> (..., rows, columns), all odd; differentiable."""
    down, right = ((side - own) // 2 for side, own in zip(size, size_of(kernel)[-2:], strict=True))
    return torch.constant_pad_nd(kernel, (right, right, down, down))  # negative padding crops


def crop(kernel: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Return the centered crop of a kernel (..., K_h, K_w); a view.

    This is exact if the removed taps are zero or never meet the map. On an (H, W) map with "same" padding no tap
    further than max(H, W) - 1 from the center does, so ``size = 2 * max(H, W) - 1`` is always enough.

    Args:
        kernel: square, unless ``size`` is a tuple, in which case sides of any parity are allowed.
        size: (rows, columns), or one number to crop both sides to; a kernel that is not larger stays whole.

    Raises:
        ValueError: (rows, columns) larger than the kernel, of another parity, or below 1.
    """
    if not isinstance(size, tuple):  # the size of a map, which may be symbolic
        margin = (size_of(kernel)[-1] - size) // 2
        return kernel[..., margin : margin + size, margin : margin + size] if margin > 0 else kernel
    rows, columns = size
    down, right = (whole - side for whole, side in zip(kernel.shape[-2:], size, strict=True))
    if min(down, right) < 0 or down % 2 or right % 2 or min(size) < 1:
        raise ValueError(f"a kernel of {tuple(kernel.shape[-2:])} taps has no centered crop of {size}.")
    return kernel[..., down // 2 : down // 2 + rows, right // 2 : right // 2 + columns]


def common_dilation(dilations: Sequence[int]) -> int:
    """Return the step of the coarsest grid with the taps of all experts: their dilations' greatest common divisor."""
    return math.gcd(*dilations)


def kernel_bank(kernels: Sequence[Tensor], dilations: Sequence[int]) -> Tensor:
    """Stack square kernels of any odd sizes and dilations on their common grid: (n, C_out, C_in/groups, K, K).

    The bank is to be applied with dilation d = :func:`common_dilation`; K spans the largest expert in steps of d.
    Differentiable with respect to every kernel.
    """
    step = common_dilation(dilations)
    spread = [k if d == step else dilate(k, d // step) for k, d in zip(kernels, dilations, strict=True)]
    sides = [size_of(k)[-1] for k in spread]
    largest = max(sides)
    return torch.stack(
        [
            k if s == largest else torch.constant_pad_nd(k, ((largest - s) // 2,) * 4)  # F.pad makes three calls more
            for k, s in zip(spread, sides, strict=True)
        ]
    )


def expert(bank: Tensor, index: int, size: int, dilation: int, step: int) -> Tensor:
    """Return expert ``index`` of a bank made by :func:`kernel_bank` with grid ``step``, as it went in; a view."""
    relative = dilation // step
    return crop(bank[index], effective_size(size, relative))[..., ::relative, ::relative]


def batch_norm_affine(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (scale, shift), each (C,) and float64, such that batch norm in evaluation is ``y * scale + shift``.

    A convolution followed by it is one convolution with ``kernel * scale`` and ``bias * scale + shift`` per channel. In
    float64, so that a folded parameter is rounded only once.
    """
    scale = torch.rsqrt(running_var.double() + eps)
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale
    return scale, shift if bias is None else shift + bias


def scale_outputs(
    kernel: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, transposed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and shift the output of a convolution: return (kernel, bias) of ``scale * conv(x) + shift``.

    Computed in the widest dtype given, and returned in the kernel's. With the result of :func:`batch_norm_affine` this
    folds a batch norm.

    Args:
        kernel: (C_out, ...), also a linear layer's.
        bias, scale, shift: (C_out,).
        transposed: groups, if the convolution is transposed and its kernel (C_in, C_out/groups, ...).
    """
    along = scale.view(-1, 1)
    if transposed is not None:  # each row of the kernel, a channel of the input, writes the outputs of its group
        along = scale.view(transposed, 1, -1).expand(-1, kernel.shape[0] // transposed, -1).flatten(0, 1)
    merged = _scaled(kernel, along.reshape(*along.shape, *(1,) * (kernel.ndim - 2)))
    offset = shift if bias is None else shift + bias * scale
    return merged, offset.to(kernel.dtype)


def _scaled(kernel: Tensor, along: Tensor) -> Tensor:
    """Return kernel * along in the kernel's dtype."""
    if torch.is_grad_enabled() or not kernel.numel():
        return (kernel * along).to(kernel.dtype)
    merged = torch.empty_like(kernel)
    rows = max(1, _CHUNK // kernel[0].numel())
    for start in range(0, len(kernel), rows):  # wide products of a whole kernel would leave the cache
        part = slice(start, start + rows)
        merged[part] = kernel[part] * along[part]
    return merged
