"""Convolutions under a Gaussian mask: Chen, Li, Ning, Lin, He, "GMConv: Modulating Effective Receptive Fields for
Convolutional Kernels", section III.

The mask multiplies each tap of a kernel by a function of its distance d from the center: ``exp(-d^2 / (2 sigma^2))``, 1
at the nearest tap. A small sigma makes a small receptive field, a large one does not change the kernel.
:class:`GMConv2d` learns one sigma and merges into a plain convolution; :class:`DynamicGMConv2d` predicts the sigmas of
an ellipse for every image.

**How sigma is read.** Eq. 3 and 5 depend only on the square of sigma, an optimizer does not keep numbers positive, and
the formula is undefined at 0. A stored or predicted sigma is therefore read as its absolute value, at least
:data:`LEAST` (a quarter of a tap: the neighbors of the center keep 3e-4) and at most :data:`MOST` times the distance of
the farthest tap (all taps keep 0.99995 or more). Within these bounds, which contain every useful sigma, this is the
paper's formula, and a state dict holds sigma in taps. Outside of them mask and gradient are those at the bound: the
gradient is finite and not zero, so that training can bring sigma back. At 0 the gradient is that of a small positive
number. Infinity and NaN are read as the upper bound, and have no gradient.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widefield import _checks
from widefield._checks import Pair
from widefield.nn._leaf import is_symbolic, recorded
from widefield.nn.depthwise import DepthwiseConv2d, PaddingMode, bare
from widefield.nn.fusing import fold_norm, learns, refuse_training
from widefield.ops import depthwise_conv2d, per_sample_conv2d
from widefield.ops._autocast import without_autocast
from widefield.ops._problem import size_of

PREDICT = {"sigma": 1, "sigma1_sigma2": 2, "sigma1_ratio": 2}
"""Options for what a dynamic layer predicts (table IV) -> how many numbers it predicts."""

LEAST = 0.25
MOST = 100.0
FADED = 1e-4
"""Smallest value of a mask by which weights are divided."""


def gaussian_mask(kernel_size: Pair, sigma_x: Tensor, sigma_y: Tensor | None = None) -> Tensor:
    """Return the max-normalized Gaussian at the taps of a kernel, eq. 4 and 6.

    ``exp(-(x^2 / sigma_x^2 + y^2 / sigma_y^2) / 2)`` with x, y from the center in taps. The center of an even kernel
    lies between taps: its mask is divided by the largest value on the grid, so that the nearest taps have 1.

    Args:
        kernel_size: (rows, columns).
        sigma_x: (...), positive, along the rows' direction: sigma_1 of the paper.
        sigma_y: (...), along the columns'; ``sigma_x`` (a circle) if None.

    Returns:
        (..., rows, columns), in the dtype of sigma or float32 if that is wider. Differentiable.
    """
    sigma_x = sigma_x.to(torch.promote_types(sigma_x.dtype, torch.float32))[..., None, None]
    sigma_y = sigma_x if sigma_y is None else sigma_y.to(sigma_x)[..., None, None]
    y, x = (_squares(size, sigma_x) for size in kernel_size)
    return torch.exp(-(x / sigma_x / sigma_x + y[:, None] / sigma_y / sigma_y) / 2)


def default_sigma(kernel_size: Pair) -> float:
    """Return the sigma from which ``from_conv2d`` starts: 5 as in the paper, or more for kernels larger than 11x11.

    With 5 the corner of AlexNet's 11x11 keeps exp(-1), and that of a 63x63 would keep 2e-17. For larger kernels sigma
    is (K - 1) / 2, at which their corners keep exp(-1), too.
    """
    return max(5.0, math.sqrt(_spread(kernel_size) / 2))


class _MaskedConv2d(nn.Module):
    """Base of both layers: the arguments, parameters and initialization of Conv2d, and the initial sigma."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair,
        padding: int | Pair | str,
        dilation: int | Pair,
        groups: int,
        bias: bool,
        padding_mode: PaddingMode,
        sigma: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = _checks.conv_channels(in_channels, out_channels, groups)
        self.kernel_size = _checks.pair("kernel_size", kernel_size)
        self.stride = _checks.pair("stride", stride)
        self.dilation = _checks.pair("dilation", dilation)
        self.padding = padding if isinstance(padding, str) else _checks.pair("padding", padding, minimum=0)
        self.padding_mode = padding_mode
        self.longest = MOST * math.sqrt(max(1.0, _spread(self.kernel_size)))
        self.start = _checks.number("sigma", sigma, minimum=LEAST, maximum=self.longest)
        conv = bare(self, bias=bias)  # type: ignore[arg-type]  # checks the arguments as Conv2d does
        self._margins = list(conv._reversed_padding_repeated_twice)
        self.weight = nn.Parameter(torch.empty(conv.weight.shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(self.weight.new_empty(self.out_channels)) if bias else None

    def reset_parameters(self) -> None:
        """Initialize kernel and bias as Conv2d does, and reset sigma, or what predicts it."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            bound = self.weight[0].numel() ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, *, init: str = "preserve", sigma: float | None = None, **options: Any
    ) -> Self:
        """Return this layer with the arguments, device, dtype and mode of ``conv``.

        If the kernel of ``conv`` is frozen (``requires_grad`` is False), so is sigma, or what predicts it.

        Args:
            conv: any convolution for which :func:`why_not` returns None.
            init: "preserve": weights are divided by the initial mask, so that the layer computes, in both modes and to
                rounding, what ``conv`` computes; "random": random weights.
            sigma: the initial value; :func:`default_sigma` of the kernel's size if None.
            options: further ones of the constructor.

        Raises:
            ValueError: ``conv`` cannot be replaced, or its kernel divided by the mask; the message says why.
        """
        preserve = _checks.init(init) == "preserve"
        reason = why_not(conv) or (fades_out(conv, sigma) if preserve else None)
        if reason:
            raise ValueError(f"{conv} cannot become a {cls.__name__}: {reason}.")
        if sigma is None:
            sigma = default_sigma(_checks.pair("kernel_size", conv.kernel_size))
        layer = cls._shaped_as(conv, sigma, device=conv.weight.device, **options)
        layer.requires_grad_(conv.weight.requires_grad)
        if layer.bias is not None and conv.bias is not None:
            layer.bias.requires_grad_(conv.bias.requires_grad)
        if preserve:
            with torch.no_grad():
                layer.weight.copy_(conv.weight / layer.mask())
                if layer.bias is not None and conv.bias is not None:
                    layer.bias.copy_(conv.bias)
        return layer.train(conv.training)

    @classmethod
    def _shaped_as(cls, conv: nn.Conv2d, sigma: float, **options: Any) -> Self:
        make: Any = cls
        return make(  # type: ignore[no-any-return]
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, conv.padding_mode, sigma=sigma, dtype=conv.weight.dtype, **options,
        )  # fmt: skip

    def mask(self) -> Tensor:
        """Return the mask (KH, KW), which does not depend on an image; float32 or wider."""
        raise NotImplementedError

    def _read(self, values: Tensor) -> Tensor:
        return _magnitude(values, LEAST, self.longest)

    def _is_depthwise(self) -> bool:
        return self.groups == self.in_channels == self.out_channels

    def _under(self, masks: Tensor) -> Tensor:
        """Return the kernel under masks that broadcast with it, in its dtype."""
        return (self.weight * masks).to(self.weight.dtype)

    def _placed(self, x: Tensor) -> tuple[Tensor, Pair]:
        """Return x, padded as far as the operator cannot do it, and the operator's padding."""
        left, right, top, bottom = self._margins
        if self.padding_mode == "zeros" and (left, top) == (right, bottom):
            return x, (top, left)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._margins, mode), (0, 0)

    def extra_repr(self) -> str:
        """Show the arguments that differ from layer to layer."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, usual in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
            if getattr(self, name) != usual:
                text += f", {name}={getattr(self, name)}"
        return text + f", bias={self.bias is not None}"


class GMConv2d(_MaskedConv2d):
    """Static GMConv: a replacement for ``torch.nn.Conv2d`` with one more parameter, sigma, eq. 2-4.

    It is not a subclass of Conv2d, because its kernel is not ``weight`` but :meth:`kernel`, ``weight`` under the mask.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in Conv2d. Distances of the mask are measured in taps, whatever the dilation.
        sigma: initial value, in taps.

    Attributes:
        weight, bias: parameters, as in Conv2d.
        sigma: parameter (1,), in taps. It has one dimension because FSDP does not support scalars, and timm and others
            exclude one-dimensional parameters from weight decay. The module documents how values that are not positive,
            or huge, are read.

    Raises:
        TypeError, ValueError: what Conv2d refuses; a sigma out of bounds.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        sigma: float = 5.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            sigma, device, dtype,
        )  # fmt: skip
        self.sigma = nn.Parameter(self.weight.new_empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize kernel and bias as Conv2d does, and sigma with its start."""
        super().reset_parameters()
        nn.init.constant_(self.sigma, self.start)

    def mask(self) -> Tensor:
        """Return the mask (KH, KW), 1 at the nearest tap; float32 or wider."""
        return gaussian_mask(self.kernel_size, self._read(self.sigma)[0])

    def kernel(self) -> Tensor:
        """Return the kernel that convolves (C_out, C_in/groups, KH, KW): ``weight`` under the mask."""
        return self._under(self.mask())

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) or (C_in, H, W) -> as Conv2d's; ValueError for an input of another shape."""
        if is_symbolic(x):
            return recorded(self, x)
        if x.ndim == 3:
            return self.forward(x[None])[0]
        _checks.images(size_of(x), self.in_channels)
        x, padding = self._placed(x)
        if self._is_depthwise():
            steps: Any = {"stride": self.stride, "padding": padding, "dilation": self.dilation}
            return depthwise_conv2d(x, self.kernel(), self.bias, **steps)
        return F.conv2d(x, self.kernel(), self.bias, self.stride, padding, self.dilation, self.groups)

    def fuse(self, norm: nn.Module | None = None) -> nn.Conv2d:
        """Return the convolution with the kernel under the mask; a DepthwiseConv2d if it is depthwise. Exact.

        Args:
            norm: a batch norm that directly follows this layer, to be folded in.

        Raises:
            RuntimeError: the layer, or ``norm``, is in training mode.
            ValueError: ``norm`` has no running statistics, or another number of channels.
        """
        refuse_training(self)
        return _folded(self, self.kernel().detach(), norm, trained=learns([self.weight, self.sigma]))


class DynamicGMConv2d(_MaskedConv2d):
    """Dynamic GMConv: a kernel per image, under an elliptic mask that is predicted from the image, eq. 5-7.

    It starts as the static layer does, with a circle of ``sigma`` for every image.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in Conv2d.
        sigma: initial value, in taps.
        predict: what is predicted, table IV: "sigma" (a circle), "sigma1_sigma2", or "sigma1_ratio", where
            sigma_2 is sigma_1 times the ratio (the paper's best).
        reduction: the r of eq. 7, at least 1.

    Attributes:
        weight, bias: parameters, as in Conv2d; the mask is applied to ``weight``.
        predictor: the :class:`SigmaPredictor`.

    Raises:
        TypeError, ValueError: what Conv2d refuses; a sigma or reduction out of bounds; an unknown word.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        sigma: float = 5.0,
        predict: str = "sigma1_ratio",
        reduction: float = 4 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            sigma, device, dtype,
        )  # fmt: skip
        self.predict = _checks.choice("predict", predict, tuple(PREDICT))
        start = (self.start, 1.0 if predict == "sigma1_ratio" else self.start)[: PREDICT[predict]]
        self.predictor = SigmaPredictor(
            self.in_channels, start, reduction, device=self.weight.device, dtype=self.weight.dtype
        )
        super().reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize kernel and bias as Conv2d does, and the predictor with its start."""
        super().reset_parameters()
        self.predictor.reset_parameters()

    def sigmas(self, x: Tensor) -> Tensor:
        """Return (sigma_1, sigma_2) for each image, along x and y: (N, C_in, H, W) -> (N, 2), in taps."""
        _checks.images(size_of(x), self.in_channels)
        return self._sigmas(self.predictor(x))

    def masks(self, x: Tensor) -> Tensor:
        """Return the mask for each image: (N, C_in, H, W) -> (N, KH, KW); float32 or wider."""
        return gaussian_mask(self.kernel_size, *self.sigmas(x).unbind(-1))

    def mask(self) -> Tensor:
        """Return the mask (KH, KW) of an image that activates no hidden unit. Before training all masks equal it."""
        return gaussian_mask(self.kernel_size, *self._sigmas(self.predictor.out.bias).unbind(-1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) or (C_in, H, W) -> as Conv2d's; ValueError for an input of another shape."""
        if is_symbolic(x):
            return recorded(self, x)
        if x.ndim == 3:
            return self.forward(x[None])[0]
        kernels = self._under(self.masks(x)[:, None, None])
        biases = None if self.bias is None else self.bias.expand(kernels.shape[0], -1)
        x, padding = self._placed(x)
        steps: Any = {"stride": self.stride, "padding": padding, "dilation": self.dilation}
        return per_sample_conv2d(x, kernels, biases, groups=self.groups, **steps)

    def fuse(self, norm: nn.Module | None = None) -> DynamicGMConv2d:
        """Return a copy of this layer, with ``norm`` folded into its kernel and bias. Exact in evaluation mode.

        The mask stays, as it depends on the image. A norm scales output channels and a mask scales taps, so that the
        norm can be folded into the weights under the mask.

        Args:
            norm: a batch norm that directly follows this layer.

        Raises:
            RuntimeError: the layer, or ``norm``, is in training mode.
            ValueError: ``norm`` has no running statistics, or another number of channels.
        """
        refuse_training(self)
        conv = _folded(self, self.weight.detach().clone(), norm, trained=learns([self.weight]))
        twin = self._shaped_as(conv, self.start, predict=self.predict, device="meta")
        twin.weight, twin.bias = conv.weight, conv.bias  # type: ignore[assignment]
        twin.predictor = copy.deepcopy(self.predictor)
        return twin.eval()

    def collapse(self, mask: Tensor) -> nn.Conv2d:
        """Return the convolution that this layer becomes with one mask (KH, KW) for all images, as GMConv2d fuses to.

        Kernels are linear in the mask: the mean of masks, not of sigmas, gives the mean kernel.

        Raises:
            ValueError: a mask of another shape, or one that is not finite.
        """
        if tuple(mask.shape) != self.kernel_size:
            raise ValueError(f"mask must be (KH, KW) = {self.kernel_size}; got shape {tuple(mask.shape)}.")
        if not mask.isfinite().all():
            raise ValueError("mask must be finite; it contains NaN or infinity.")
        kernel = self._under(mask.to(self.weight.device)).detach()
        return _folded(self, kernel, None, trained=learns([self.weight]))

    def _sigmas(self, predicted: Tensor) -> Tensor:
        """(..., n) as predicted -> (..., 2) as read."""
        first, second = predicted[..., 0], predicted[..., -1]
        first = self._read(first)
        if self.predict == "sigma1_ratio":
            widest = self.longest / LEAST
            second = first * _magnitude(second, 1 / widest, widest)
        return torch.stack((first, self._read(second)), -1)

    def extra_repr(self) -> str:
        """Show the arguments that differ from layer to layer."""
        return f"{super().extra_repr()}, predict={self.predict}"


class SigmaPredictor(nn.Module):
    """The sigma module, eq. 7: global max and average pool, FC, ReLU, FC; (N, C, H, W) -> (N, n).

    The last layer starts with zero weights and the bias ``start``: the prediction is exactly ``start`` for every image,
    so that a converted model keeps its function. In the first step only the last layer has gradients, afterwards both
    do. It is computed in the parameters' precision, also under autocast, as it is cheap.

    Args:
        in_channels: C.
        start: the n initial values.
        reduction: r; there are floor(2C / r) hidden units, at least one.
    """

    def __init__(
        self,
        in_channels: int,
        start: tuple[float, ...],
        reduction: float = 4 / 3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.start = start
        width = max(1, math.floor(2 * in_channels / _checks.number("reduction", reduction, minimum=1.0)))
        self.hidden = nn.Linear(2 * in_channels, width, bias=False, device=device, dtype=dtype)
        self.out = nn.Linear(width, len(start), device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize both layers."""
        self.hidden.reset_parameters()
        with torch.no_grad():
            self.out.weight.zero_()
            self.out.bias.copy_(torch.tensor(self.start, dtype=self.out.bias.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, n), in the parameters' dtype."""
        dtype = self.hidden.weight.dtype
        with without_autocast(x):
            pooled = torch.cat((x.amax((2, 3)).to(dtype), x.mean((2, 3), dtype=dtype)), 1)
            y: Tensor = self.out(F.relu(self.hidden(pooled)))
            return y


def why_not(conv: nn.Module) -> str | None:
    """Return why ``conv`` cannot become a masked convolution, or None if it can."""
    if not isinstance(conv, nn.Conv2d) or type(conv) not in (nn.Conv2d, DepthwiseConv2d):
        return f"it is a {type(conv).__name__}, not a plain torch.nn.Conv2d"
    height, width = conv.kernel_size
    if _spread((height, width)) == 0:
        return f"all taps of its {height}x{width} kernel are equally far from the center, so a mask has no effect"
    return None


def fades_out(conv: nn.Conv2d, sigma: float | None = None) -> str | None:
    """Return why the kernel of ``conv`` cannot be divided by the mask of ``sigma`` (of the default: None), or None."""
    if sigma is None:
        return None  # default_sigma() is large enough
    height, width = conv.kernel_size
    spread = _spread((height, width))
    corner = math.exp(-spread / 2 / _checks.number("sigma", sigma, minimum=LEAST) ** 2)
    if corner >= FADED:
        return None
    needed = math.sqrt(-spread / 2 / math.log(FADED))
    return (
        f"under sigma={sigma:g} the corners of its {height}x{width} kernel keep {corner:.0e}, too little to divide by: "
        f"use a sigma of at least {needed:.2f}, or init='random'"
    )


def _folded(layer: _MaskedConv2d, kernel: Tensor, norm: nn.Module | None, *, trained: bool) -> nn.Conv2d:
    """Return the convolution that ``layer`` would be with this kernel, and ``norm`` after it."""
    plain = bare(layer, bias=layer.bias is not None)  # type: ignore[arg-type]
    plain.weight = nn.Parameter(kernel, trained)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    plain.eval()
    if layer._is_depthwise():
        plain = DepthwiseConv2d.from_conv2d(plain)
    return plain if norm is None else fold_norm(plain, norm)


def _magnitude(values: Tensor, least: float, most: float) -> Tensor:
    """Return |values| within bounds, with the gradient of |values| also beyond them; see this module."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    size = torch.where(values < 0, -values, values).nan_to_num(nan=most)  # abs() has no gradient at 0
    return size.clamp(least, most).detach() + (size - size.detach())


def _squares(size: int, like: Tensor) -> Tensor:
    """Return the squared offsets of a side's taps from its middle, less the smallest of them: (size,)."""
    offsets = torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2
    return offsets.square() - (0.25 if size % 2 == 0 else 0.0)


def _spread(kernel_size: Pair) -> float:
    """Return the squared distance of the farthest taps from the center, less that of the nearest."""
    return sum((size // 2) ** 2 if size % 2 else ((size - 1) ** 2 - 1) / 4 for size in kernel_size)
