"""DCNv3, the operator of InternImage: Wang et al., "InternImage: Exploring Large-Scale Vision Foundation Models with
Deformable Convolutions", CVPR 2023, section 3.1, eq. 2.

A convolution with moving points: for every pixel and group of channels, positions and weights of K points are predicted
from the input. The weights of the points sum to one. Linear layers mix the channels before and after. Keys are those of
the paper's code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from widefield import _checks
from widefield.nn._leaf import is_symbolic, recorded
from widefield.nn.depthwise import DepthwiseConv2d
from widefield.ops._problem import channels_first, is_channels_last, laid_out, size_of
from widefield.ops.deform import BACKENDS, Sampling, dcnv3, grid_sampled, sampling_points

GROUP_CHANNELS = 16
"""Channels of a group in the published networks."""


class DCNv3(nn.Module):
    """Deformable convolution, version 3; channels last: (N, H, W, C) -> (N, Ho, Wo, C_out).

    The depthwise convolution that predicts offsets and weights has the centers and the stride of the grid of points, so
    any stride and padding works. In the paper's code the module takes a stride, but fails for strides other than 1.

    Args:
        channels: C.
        kernel_size: the grid has ``K = kernel_size**2`` points.
        dw_kernel_size: of the depthwise convolution, odd; ``kernel_size`` by default.
        stride, dilation: of the grid.
        pad: zeros around the map; None: the number that keeps its size at stride 1.
        groups: each has its own points for its ``C / groups`` channels.
        offset_scale: multiplies offsets and grid.
        center_feature_scale: mix each output with the input at its position, by a gate for each group (InternImage-H).
        remove_center: omit the point at the center.
        out_channels: C_out; ``channels`` by default.
        norm_layer: channels -> norm after the depthwise convolution, for (N, C, H, W).
        act_layer: -> activation after that norm.
        backend: of :func:`widefield.ops.deform.dcnv3`.

    Raises:
        TypeError, ValueError: numbers out of range; channels not divisible by groups; a grid of even span or an even
            ``dw_kernel_size``, which have no center; a depthwise convolution too small for the padding.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        dw_kernel_size: int | None = None,
        stride: int = 1,
        pad: int | None = None,
        dilation: int = 1,
        groups: int = 4,
        offset_scale: float = 1.0,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        *,
        out_channels: int | None = None,
        norm_layer: Callable[[int], nn.Module] = LayerNorm2d,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels = _checks.integer("channels", channels)
        self.out_channels = _checks.integer("out_channels", channels if out_channels is None else out_channels)
        self.backend = _checks.choice("backend", backend, BACKENDS)
        size = _checks.integer("kernel_size", kernel_size)
        span = _checks.integer("dilation", dilation) * (size - 1)
        if span % 2:
            raise ValueError(f"a grid of kernel_size={size} and dilation={dilation} has no center: use an odd size.")
        pad = span // 2 if pad is None else pad
        self.sampling = Sampling(size, stride, pad, dilation, groups, offset_scale, remove_center).checked()
        if channels % groups:
            raise ValueError(f"channels must be divisible by groups; got channels={channels} and groups={groups}.")
        dw_size = size if dw_kernel_size is None else dw_kernel_size
        self.dw_conv = nn.Sequential(
            DepthwiseConv2d(channels, channels, dw_size, stride, _depthwise_padding(dw_size, self.sampling), **where),
            keyed(1, norm_layer(channels).to(device, dtype)),
            act_layer(),
        )
        count = groups * self.sampling.points
        self.offset = nn.Linear(channels, 2 * count, **where)
        self.mask = nn.Linear(channels, count, **where)
        self.input_proj = nn.Linear(channels, channels, **where)
        self.output_proj = nn.Linear(channels, self.out_channels, **where)
        self.center_feature_scale = bool(center_feature_scale)
        if self.center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.empty(groups, channels, **where))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.empty(groups, **where))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start on the regular grid with equal weights, as the paper's code does.

        While ``offset`` and ``mask`` are zero, they pass no gradient: ``dw_conv`` learns from the second step on.
        """
        for layer in (self.offset, self.mask):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.input_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)

    def points(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the points that the layer reads of x (N, H, W, C), and their weights; G groups of K points.

        Returns:
            (N, Ho, Wo, G, K, 2), per point (column, row) in pixels, and (N, Ho, Wo, G, K).
        """
        offset, mask = self._offset_and_mask(self.features(x))
        places = sampling_points(offset, (x.shape[1], x.shape[2]), self.sampling)
        return places, mask.unflatten(-1, (self.sampling.groups, -1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, Ho, Wo, C_out)."""
        if is_symbolic(x):
            return recorded(self, x)
        features = self.features(x)  # first, as it checks the shape
        return self.sampled(features, self.input_proj(x))

    def sampled(self, features: Tensor, value: Tensor) -> Tensor:
        """Return the output for features (N, Ho, Wo, C), which set the offsets, and values to sample (N, H, W, C)."""
        y = dcnv3(value, *self._offset_and_mask(features), **self.sampling._asdict(), backend=self.backend)
        if self.center_feature_scale:
            y = self._with_center(y, value, features)
        out: Tensor = self.output_proj(y)
        return out

    def plain_forward(self, x: Tensor) -> Tensor:
        """Compute the same with F.grid_sample, which torch.fx, torch.jit.script and ONNX support.

        Slower than ``forward`` on CPUs, and without a check of the input's shape.
        """
        features = self.dw_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        value = self.input_proj(x)
        y = grid_sampled(value, *self._offset_and_mask(features), self.sampling)
        if self.center_feature_scale:
            y = self._with_center(y, value, features)
        out: Tensor = self.output_proj(y)
        return out

    def features(self, x: Tensor) -> Tensor:
        """Return what offsets and weights are computed from, (N, Ho, Wo, C); ValueError for another shape of input."""
        if x.ndim != 4 or size_of(x)[-1] != self.channels:
            raise ValueError(
                f"the input must be (N, H, W, {self.channels}); got shape {tuple(x.shape)}. "
                "Bring a map to channels last with x.permute(0, 2, 3, 1)."
            )
        features: Tensor = self.dw_conv(x.permute(0, 3, 1, 2))
        return features.permute(0, 2, 3, 1)

    def _offset_and_mask(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mask: Tensor = self.mask(features).unflatten(-1, (self.sampling.groups, -1)).softmax(-1)
        return self.offset(features), mask.flatten(-2)

    def _with_center(self, y: Tensor, value: Tensor, features: Tensor) -> Tensor:
        sampling = self.sampling
        gate = F.linear(features, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias).sigmoid()
        more = sampling.padding - sampling.reach  # negative if the outermost pixels are not centers
        center = F.pad(value, (0, 0, more, more, more, more))[:, :: sampling.stride, :: sampling.stride]
        gate, groups = gate[..., None], (sampling.groups, -1)
        mixed: Tensor = y.unflatten(-1, groups) * (1 - gate) + center.unflatten(-1, groups) * gate
        return mixed.flatten(-2)

    def extra_repr(self) -> str:
        """Show the arguments that differ from layer to layer."""
        words = [str(self.channels)]
        if self.out_channels != self.channels:
            words.append(f"out_channels={self.out_channels}")
        defaults = Sampling(padding=self.sampling.reach)._asdict()
        given = {k: v for k, v in self.sampling._asdict().items() if v != defaults[k] or k in ("kernel_size", "groups")}
        words += [f"{name}={value}" for name, value in given.items()]
        return ", ".join(words) + (", center_feature_scale=True" if self.center_feature_scale else "")


class DeformConv2d(DCNv3):
    """:class:`DCNv3` as a replacement for Conv2d: (N, C_in, H, W) -> (N, C_out, Ho, Wo), in x's memory format.

    The output has the size of the convolution's. The layer cannot compute a given convolution, as the channels of a
    group share the weights of their points.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation: as in Conv2d, one number each.
        groups: unlike in Conv2d, the number of sets of points. By default a group has 16 channels, as in the paper, or
            the next larger number that divides the channels.
        options: further ones of :class:`DCNv3`, by name; also ``device`` and ``dtype``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int | None = None,
        **options: Any,
    ) -> None:
        groups = default_groups(in_channels) if groups is None else groups
        super().__init__(
            in_channels,
            kernel_size,
            stride=stride,
            pad=padding,
            dilation=dilation,
            groups=groups,
            out_channels=out_channels,
            **options,
        )

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, *, groups: int | None = None, **options: Any) -> DeformConv2d:
        """Return a new layer with the channels, size, stride, padding, device, dtype and mode of ``conv``.

        If the kernel of ``conv`` is frozen (``requires_grad`` is False), so is the layer.

        Raises:
            TypeError, ValueError: ``conv`` cannot be replaced; the message is that of :func:`why_not`. Or groups do not
                divide its input channels.
        """
        reason = why_not(conv)
        if reason is not None:
            raise ValueError(f"{conv} cannot become a DeformConv2d: {reason}.")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[0],
            conv.stride[0],
            _padding(conv),
            conv.dilation[0],
            groups,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **options,
        )
        return layer.requires_grad_(conv.weight.requires_grad).train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, Ho, Wo)."""
        if is_symbolic(x):
            return recorded(self, x)
        _checks.images(size_of(x), self.channels)
        y = channels_first(super().forward(x.permute(0, 2, 3, 1)))
        return laid_out(y, is_channels_last(x))

    def plain_forward(self, x: Tensor) -> Tensor:
        """Compute the same as a contiguous (N, C_out, Ho, Wo); see :meth:`DCNv3.plain_forward`."""
        return super().plain_forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def why_not(conv: nn.Module) -> str | None:
    """Return why ``conv`` cannot become a :class:`DeformConv2d`, or None if it can."""
    if not isinstance(conv, nn.Conv2d) or type(conv) not in (nn.Conv2d, DepthwiseConv2d):
        return f"it is a {type(conv).__name__}, not a plain torch.nn.Conv2d"
    (height, width), dilation = conv.kernel_size, conv.dilation
    if height != width:
        return f"its kernel is not square ({height}x{width})"
    if height % 2 == 0 or height == 1:
        return f"its kernel size is {height}, and a grid of points needs an odd size of at least 3"
    if conv.stride[0] != conv.stride[1] or dilation[0] != dilation[1]:
        return f"its stride {conv.stride} or dilation {dilation} differs between the axes"
    if conv.padding_mode != "zeros":
        return f"its padding mode is {conv.padding_mode!r}, not 'zeros'"
    if not isinstance(conv.padding, str) and conv.padding[0] != conv.padding[1]:
        return f"its padding {conv.padding} differs between the axes"
    if _padding(conv) + height // 2 < dilation[0] * (height // 2):
        return f"its padding is {conv.padding}, and the offsets of a grid with dilation {dilation[0]} need more"
    return None


def default_groups(channels: int) -> int:
    """Return the largest number of groups that have at least 16 channels and divide ``channels``; 1 if none do."""
    return max((g for g in range(1, channels // GROUP_CHANNELS + 1) if channels % g == 0), default=1)


def keyed(index: int, layer: nn.Module) -> nn.Sequential:
    """Return a sequence with ``layer`` at ``index``, as the official keys count changes of layout as layers."""
    return nn.Sequential(OrderedDict({str(index): layer}))


def _depthwise_padding(size: int, sampling: Sampling) -> int:
    """Return the padding with which a depthwise kernel of ``size`` has the centers of the grid of points."""
    size = _checks.integer("dw_kernel_size", size)
    if size % 2 == 0:
        raise ValueError(f"dw_kernel_size must be odd, so that it is centered on a pixel; got {size}.")
    missing = sampling.reach - sampling.padding
    if size // 2 < missing:
        raise ValueError(
            f"with pad={sampling.padding} a grid that reaches {sampling.reach} pixels needs a dw_kernel_size of "
            f"at least {2 * missing + 1}; got {size}."
        )
    return size // 2 - missing


def _padding(conv: nn.Conv2d) -> int:
    if conv.padding == "same":
        return conv.dilation[0] * (conv.kernel_size[0] // 2)
    return 0 if isinstance(conv.padding, str) else conv.padding[0]
