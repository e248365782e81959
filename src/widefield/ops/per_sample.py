"""Convolve with per-sample kernels, for mixtures and dynamic masks."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield._checks import Pair
from widefield.ops._autocast import autocast_dtype, without_autocast
from widefield.ops._operators import depthwise
from widefield.ops._problem import (
    is_channels_last,
    is_exported,
    is_scripted_for_onnx,
    is_traced,
    laid_out,
    output_size,
    size_of,
)

_MOST_ONE_BY_ONE = 32
"""Images of an exported graph that get a convolution each in every layer: more make graphs large and slow to build."""


def per_sample_conv2d(
    x: Tensor,
    kernels: Tensor,
    biases: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolve sample n of x with ``kernels[n]`` and add ``biases[n]``.

    Args:
        x: (N, C_in, H, W), any memory format; under autocast in autocast's dtype.
        kernels: (N, C_out, C_in/groups, KH, KW).
        biases: (N, C_out) or None.
        stride, padding, dilation: (rows, columns).
        groups: as F.conv2d's.

    Returns:
        (N, C_out, H_out, W_out) as F.conv2d's, in the memory format of x and in its dtype. Differentiable.

    Raises:
        ValueError: kernels or biases that do not fit x.
    """
    batch, c_in = size_of(x)[:2]
    count, c_out, c_group = size_of(kernels)[:3] if kernels.ndim == 5 else (0, 0, 0)
    if kernels.ndim != 5 or count != batch or c_group * groups != c_in or c_out % groups:
        raise ValueError(
            f"kernels must be (N, C_out, C_in/groups, KH, KW) with N={batch}, C_in={c_in} and groups={groups}, which "
            f"divides C_out; got shape {tuple(kernels.shape)}."
        )
    if biases is not None and size_of(biases) != (batch, c_out):
        raise ValueError(f"biases must be (N, C_out) = ({batch}, {c_out}) or None; got shape {tuple(biases.shape)}.")
    return convolve_samples(x, kernels, biases, stride, padding, dilation, groups)


def convolve_samples(
    x: Tensor, kernels: Tensor, biases: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """Compute :func:`per_sample_conv2d` from arguments that are known to fit together."""
    c_out, c_group = size_of(kernels)[1:3]
    dtype = autocast_dtype(x) or x.dtype
    x, kernels, biases = x.to(dtype), kernels.to(dtype), None if biases is None else biases.to(dtype)
    if c_group == 1 and c_out == groups and not is_exported():
        return depthwise(x, kernels.squeeze(2), biases, stride, padding, dilation, "auto")
    if size_of(x)[0] == 0:  # grouped convolution refuses zero groups
        with without_autocast(x):
            y = F.conv2d(x, kernels.sum(0), None, stride, padding, dilation, groups)
        return laid_out(y, is_channels_last(x))
    layout = is_channels_last(x)
    if x.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        # Grouped convolutions in 16 bits fall back to loops on CPUs; in 32 bits they are faster, and more exact.
        x, kernels, biases = x.float(), kernels.float(), None if biases is None else biases.float()
    with without_autocast(x):
        convolve = _as_one_image
        if is_scripted_for_onnx():  # where the number of groups is a constant
            convolve = _unfolded
        elif is_traced():
            convolve = _scripted()
        elif torch.compiler.is_exporting() and _is_small(x.shape[0]):
            convolve = _one_by_one
        y = convolve(x, kernels, biases, stride, padding, dilation, groups)
    return laid_out(y.to(dtype), layout)


def _as_one_image(
    x: Tensor, kernels: Tensor, biases: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """Convolve a batch as the groups of one image."""
    batch = x.shape[0]
    y = F.conv2d(
        x.reshape([1, batch * x.shape[1], x.shape[2], x.shape[3]]),
        kernels.flatten(0, 1),
        None if biases is None else biases.flatten(),
        stride,
        padding,
        dilation,
        batch * groups,
    )
    # Not a view: one made under no_grad could not be changed in place where gradients are on.
    flat: Tensor = torch.ops.aten._unsafe_view(y, [batch, kernels.shape[1], y.shape[2], y.shape[3]])
    return flat


def _is_small(batch: int | torch.SymInt) -> bool:
    """Return whether a graph is for a known number of images, of which each can have a convolution of its own."""
    return isinstance(batch, int) and 1 < batch <= _MOST_ONE_BY_ONE


def _one_by_one(
    x: Tensor, kernels: Tensor, biases: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """Convolve the images of a batch one after the other.

    Runtimes have fast kernels for layouts with blocks of channels, and leave them to see a batch as one image. OpenVINO
    runs a mixture of ConvNeXt-T so at 0.96 of the plain network instead of 0.88 (`benchmarks/serving.py runtimes`).
    """
    own_biases = [None] * len(x) if biases is None else biases.unbind()
    images = zip(x.split(1), kernels.unbind(), own_biases, strict=True)
    return torch.cat([F.conv2d(*image, stride, padding, dilation, groups) for image in images])


def _unfolded(
    x: Tensor, kernels: Tensor, biases: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """Convolve by a product of matrices with the taps of every pixel."""
    _, c_out, c_group, *size = size_of(kernels)
    taps = c_group * size[0] * size[1]
    columns = F.unfold(x, tuple(size), dilation, padding, stride).reshape([x.shape[0], groups, taps, -1])
    y = kernels.reshape([x.shape[0], groups, c_out // groups, taps]) @ columns
    y = y.reshape([x.shape[0], c_out, *output_size(x.shape[2:], tuple(size), stride, padding, dilation)])
    return y if biases is None else y + biases[:, :, None, None]


@functools.cache
def _scripted() -> Callable[..., Tensor]:
    """Return :func:`_as_one_image` for torch.jit.trace, which would fix the number of groups and so the batch size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, but so is the trace that needs it
        scripted: Callable[..., Tensor] = torch.jit.script(_as_one_image)
    return scripted
