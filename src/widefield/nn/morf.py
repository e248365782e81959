"""Mixture of receptive fields: Lian, Yu, Wang, "Receptive Fields As Experts in Convolutional Neural Architectures",
ICML 2024, section 3 and appendix B.

The kernel of this convolution is mixed from experts of several sizes, separately for each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield._checks import Expert, Pair
from widefield.nn import depthwise
from widefield.nn._leaf import is_symbolic, recorded
from widefield.nn.depthwise import DepthwiseConv2d
from widefield.nn.fusing import exact_affine, learns, refuse_training
from widefield.nn.router import Router
from widefield.ops import _inference, bank_conv2d, fold, mixture_conv2d
from widefield.ops._problem import is_differentiated, is_exported, size_of
from widefield.ops.mixture import BACKENDS


class MoRFConv2d(nn.Module):
    """A replacement for ``torch.nn.Conv2d`` that mixes convolutions of several sizes for each image: eq. 3 and 6.

    Input (N, C_in, H, W), output (N, C_out, ceil(H/stride), ceil(W/stride)): "same" alignment, all experts centered on
    the same pixel. Depthwise, grouped and dense.

    Args:
        in_channels, out_channels, groups, bias: as in Conv2d.
        kernel_sizes: one entry per expert, an odd size or a pair (odd size, dilation); sizes may repeat.
            ``(3, 3, 3, 3)`` with softmax attention is Dynamic Convolution (Chen et al. 2020), ``(3, (3, 2))`` is the
            pair of SKNet (Li et al. 2019).
        stride: one integer.
        routing: "soft" (eq. 6) or "hard" (eq. 3-5).
        attention: for soft routing: "none" (unnormalized, the paper's best), "softmax" or "sigmoid" (table 2c).
        top_k: for hard routing: the number of experts per image.
        router_width: hidden width of the router; default :func:`widefield.nn.router.default_width`.
        backend: of :func:`widefield.ops.mixture_conv2d`.

    Attributes:
        kernel_sizes: tuple of n sizes K_r.
        dilations: tuple of n dilations.
        router: the :class:`widefield.nn.Router`.

    Raises:
        TypeError, ValueError: an even kernel size, no experts, ``top_k`` out of range, an unknown word, channels that
            groups does not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[int | Expert] = (3, 5, 7, 9, 11),
        stride: int | Pair = 1,
        *,
        groups: int = 1,
        bias: bool = True,
        routing: str = "soft",
        attention: str = "none",
        top_k: int = 2,
        router_width: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        experts = _checks.experts(kernel_sizes)
        self.in_channels, self.out_channels, self.groups = _checks.conv_channels(in_channels, out_channels, groups)
        self.kernel_sizes = tuple(size for size, _ in experts)
        self.dilations = tuple(dilation for _, dilation in experts)
        self.stride = _checks.square("stride", stride)
        self.backend = _checks.choice("backend", backend, BACKENDS)
        self.router = Router(
            self.in_channels,
            len(experts),
            width=router_width,
            routing=routing,
            attention=attention,
            top_k=top_k,
            device=device,
            dtype=dtype,
        )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (self.out_channels, self.in_channels // self.groups)
        self.expert_weights = nn.ParameterList(torch.empty(*shape, k, k, **factory) for k in self.kernel_sizes)
        self.expert_biases = (
            nn.ParameterList(torch.empty(self.out_channels, **factory) for _ in experts) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize every expert as Conv2d does, and the router."""
        self.router.reset_parameters()
        for r, weight in enumerate(self.expert_weights):
            nn.init.kaiming_uniform_(weight, a=5**0.5)
            if self.expert_biases is not None:
                bound = weight[0].numel() ** -0.5
                nn.init.uniform_(self.expert_biases[r], -bound, bound)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        kernel_sizes: Sequence[int | Expert] = (3, 5, 7, 9, 11),
        *,
        init: str = "preserve",
        **options: Any,
    ) -> MoRFConv2d:
        """Return a mixture with the channels, stride, groups, bias, device, dtype and mode of ``conv``.

        If the kernel of ``conv`` is frozen (``requires_grad`` is False), so are experts and router; likewise biases.

        The experts' dilations are multiplied by that of ``conv``: a mixture in place of a dilated 3x3 convolution (a
        network with output stride 8, say) has experts of the sizes asked for, on the same grid of pixels.

        Args:
            conv: odd square kernel, "same" padding with zeros, one stride for both axes.
            kernel_sizes, options: as in the constructor.
            init: "preserve": in evaluation mode the layer computes what ``conv`` computes (see :meth:`absorb`);
                "random": random weights.

        Raises:
            ValueError: ``conv`` cannot be replaced (the message says why), or with ``init="preserve"`` no expert can
                hold its kernel.
        """
        _checks.init(init)
        reason = why_not(conv) or (lacks_room(conv, kernel_sizes) if init == "preserve" else None)
        if reason:
            raise ValueError(f"{conv} cannot become a mixture: {reason}.")
        preserve = init == "preserve"
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            _inherit(kernel_sizes, conv.dilation[0]),
            stride=_checks.square("stride", conv.stride),
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta" if preserve else conv.weight.device,  # absorb() overwrites all weights
            dtype=conv.weight.dtype,
            **options,
        )
        if preserve:
            layer.to_empty(device=conv.weight.device)
            layer.router.reset_parameters()
            layer.absorb(conv)
        layer.requires_grad_(conv.weight.requires_grad)
        if layer.expert_biases is not None and conv.bias is not None:
            layer.expert_biases.requires_grad_(conv.bias.requires_grad)
        return layer.train(conv.training)

    @torch.no_grad()
    def absorb(self, conv: nn.Conv2d) -> None:
        """Set experts and router so that the mixture computes ``conv``, and every expert can learn.

        The router starts with weights a_r that do not depend on the input. Every expert starts as the old kernel,
        cropped or zero-padded to its size, and scaled so that the mixture keeps its scale. Noise of a tenth of the root
        mean square is added, as equal experts would get equal gradients forever. The smallest expert that can hold the
        old kernel then takes the remainder ``(W - sum_r a_r W_r) / a_keeper``, so the sum is W to rounding. No expert
        starts at zero, so router and experts have gradients in the first step (but see ``top_k=1`` in
        :class:`widefield.nn.Router`).
        """
        step = fold.common_dilation(
            [*self.dilations, conv.dilation[0]]
        )  # without it a dilation of 36 makes 361x361 kernels
        dilation = conv.dilation[0] // step
        experts = tuple((k, d // step) for k, d in zip(self.kernel_sizes, self.dilations, strict=True))
        keeper = _keeper(experts, conv.kernel_size[0], dilation)
        if keeper is None:
            raise ValueError(f"{conv} does not fit into any expert of {self}.")
        home = experts[keeper]
        old = _regrid(conv.weight.double(), (conv.kernel_size[0], dilation), home)
        a = self.router.settle(keeper).double()
        noise = 0.1 * old.square().mean().sqrt()
        noise = torch.where(noise > 0, noise, 1e-2)
        mixed = torch.zeros_like(old)
        for r, (weight, expert) in enumerate(zip(self.expert_weights, experts, strict=True)):
            weight.copy_(_regrid((old + noise * torch.randn_like(old)) / a.sum(), home, expert))
            mixed += a[r] * _regrid(weight.double(), expert, home)  # as rounded; zero wherever the keeper has no tap
        self.expert_weights[keeper].copy_(self.expert_weights[keeper].double() + (old - mixed) / a[keeper])
        if self.expert_biases is not None and conv.bias is not None:
            for bias in self.expert_biases:
                bias.copy_(conv.bias.double() / a.sum())

    def route(self, x: Tensor) -> Tensor:
        """Return the routing weights (N, n) of x (N, C_in, H, W). In training mode hard routing adds noise.

        Raises:
            ValueError: an input of another shape.
        """
        _checks.images(size_of(x), self.in_channels)
        weights: Tensor = self.router(x)
        return weights

    def kernels(self) -> list[Tensor]:
        """Return the experts' kernels: n parameters (C_out, C_in/groups, K_r, K_r), not dilated."""
        return _listed(self.expert_weights)

    def biases(self) -> list[Tensor] | None:
        """Return the experts' biases: n parameters (C_out,), or None."""
        return None if self.expert_biases is None else _listed(self.expert_biases)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, ceil(H/stride), ceil(W/stride))."""
        if is_symbolic(x):
            return recorded(self, x)
        return mixture_conv2d(
            x,
            self.kernels(),
            self.biases(),
            self.route(x),
            stride=self.stride,
            groups=self.groups,
            dilations=self.dilations,
            sparse=self.router.routing == "hard",
            backend=self.backend,
        )

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias", "kernel_size", "dilation", "padding"):
            raise AttributeError(
                f"a mixture has no single {name!r}: it has layer.kernels(), layer.biases(), layer.kernel_sizes and "
                "layer.dilations. If the model reads it from a convolution, exclude that one with convert(..., where=)."
            )
        return super().__getattr__(name)

    def fuse(self, norm: nn.Module | None = None) -> FusedMoRFConv2d:
        """Return the reparameterized layer: one padded kernel bank and the router. Exact in evaluation mode.

        Args:
            norm: a batch norm that directly follows this layer, to be folded in.

        Raises:
            RuntimeError: the layer, or ``norm``, is in training mode.
            ValueError: ``norm`` has no running statistics, or another number of channels.
        """
        refuse_training(self)
        return FusedMoRFConv2d(self, norm)

    def collapse(self, weights: Tensor) -> nn.Conv2d:
        """Return the single convolution that this mixture becomes if all images have the same routing weights.

        Its kernel is ``sum_r weights[r] * W_r`` (eq. 7), summed in float64, with the experts padded to the largest one.
        It is in evaluation mode, and a :class:`widefield.nn.DepthwiseConv2d` if the mixture is depthwise. Its
        parameters are new, in the experts' memory format, and require gradients if the experts do.

        Args:
            weights: (n,), of any dtype.

        Raises:
            ValueError: another shape, or weights that are not finite.
        """
        with torch.no_grad():
            bank = fold.kernel_bank(self.kernels(), self.dilations)
            biases = self.biases()
            conv = _collapsed(self, weights, bank, None if biases is None else torch.stack(biases), None)
            if any(_channels_last(kernel) for kernel in self.kernels()):
                conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
        conv.weight.requires_grad_(learns(self.kernels()))
        if conv.bias is not None and biases is not None:
            conv.bias.requires_grad_(learns(biases))
        return conv

    def extra_repr(self) -> str:
        """Show the arguments that differ from layer to layer."""
        sizes = tuple(
            size if dilation == 1 else (size, dilation)
            for size, dilation in zip(self.kernel_sizes, self.dilations, strict=True)
        )
        text = f"{self.in_channels}, {self.out_channels}, kernel_sizes={sizes}, stride={self.stride}"
        return text + (f", groups={self.groups}" if self.groups > 1 else "") + f", bias={self.biases() is not None}"


class FusedMoRFConv2d(nn.Module):
    """The reparameterized :class:`MoRFConv2d` (eq. 7): mixes one kernel per sample from one bank. Made by ``fuse()``.

    Attributes:
        bank: parameter (n, C_out, C_in/groups, K, K), see :func:`widefield.ops.fold.kernel_bank`. Its padding gets no
            gradients, so that it stays zero in training.
        bias_bank: parameter (n, C_out) or None.
        shift: parameter (C_out,) or None: the shift of a folded batch norm.
        kernel_sizes, dilations, router: as in the mixture.
    """

    def __init__(self, layer: MoRFConv2d, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.router = layer.router.for_inference()
        self.in_channels, self.stride, self.groups = layer.in_channels, layer.stride, layer.groups
        self.kernel_sizes, self.dilations, self.backend = layer.kernel_sizes, layer.dilations, layer.backend
        with torch.no_grad():
            bank = fold.kernel_bank(layer.kernels(), layer.dilations)
            biases = layer.biases()
            bias_bank = None if biases is None else torch.stack(biases)
            shift = None
            if norm is not None:
                scale, shift = exact_affine(norm)
                if len(scale) != layer.out_channels:
                    raise ValueError(
                        f"cannot fold a batch norm of {len(scale)} channels into {layer.out_channels} outputs."
                    )
                dtype = bank.dtype  # the norm's may be wider
                bank = (bank * scale[:, None, None, None]).to(dtype)
                bias_bank = None if bias_bank is None else (bias_bank * scale).to(dtype)
                shift = shift.to(dtype)
        self.bank = nn.Parameter(bank, learns(layer.kernels()))
        self.bias_bank = None if bias_bank is None else nn.Parameter(bias_bank, learns(biases or ()))
        self.shift = None if shift is None else nn.Parameter(shift, self.bank.requires_grad)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, ceil(H/stride), ceil(W/stride)); ValueError for an input of another shape."""
        if is_symbolic(x):
            return recorded(self, x)
        experts = tuple(zip(self.kernel_sizes, self.dilations, strict=True))
        bank: Tensor = self.bank
        sparse = self.router.routing == "hard"
        if not sparse:  # a shape that was checked before needs no more than the mix and the convolution
            bias_bank, shift = self.bias_bank, self.shift
            key = _inference.key_of(x, bank, bias_bank, experts, self.stride, self.groups, self.backend)
            ready = None if key is None else _inference.known(key)
            if ready is not None:
                y = ready.run(x, bank, bias_bank, self.router(x))
                return y if shift is None else y + shift[:, None, None]
        _checks.images(size_of(x), self.in_channels)
        if is_differentiated(bank) and not is_exported():  # exported graphs are for inference
            ones = [bank.new_ones(1, 1, size, size) for size in self.kernel_sizes]
            bank = bank * fold.kernel_bank(ones, self.dilations)
        y = bank_conv2d(
            x,
            bank,
            self.bias_bank,
            self.router(x),
            experts=experts,
            stride=self.stride,
            groups=self.groups,
            sparse=sparse,
            backend=self.backend,
        )
        return y if self.shift is None else y + self.shift[:, None, None].to(y.dtype)

    def collapse(self, weights: Tensor) -> nn.Conv2d:
        """Return the single convolution for fixed routing weights; see :meth:`MoRFConv2d.collapse`."""
        with torch.no_grad():
            conv = _collapsed(self, weights, self.bank, self.bias_bank, self.shift)
        conv.weight.requires_grad_(self.bank.requires_grad)
        if conv.bias is not None:
            conv.bias.requires_grad_(learns([self.bias_bank, self.shift]))
        return conv

    def extra_repr(self) -> str:
        """Show the bank's shape."""
        return f"bank={tuple(self.bank.shape)}, stride={self.stride}, groups={self.groups}"


def _collapsed(
    layer: MoRFConv2d | FusedMoRFConv2d, weights: Tensor, bank: Tensor, bias_bank: Tensor | None, shift: Tensor | None
) -> nn.Conv2d:
    """Return the convolution with the sum of a bank, weighted by ``weights`` (n,), and of its biases, and ``shift``."""
    if tuple(weights.shape) != (len(bank),):
        raise ValueError(f"weights must be ({len(bank)},), one for each expert; got shape {tuple(weights.shape)}.")
    if not weights.isfinite().all():
        raise ValueError(f"weights must be finite; got {weights.tolist()}.")
    shares = weights.to(bank.device, torch.float64)
    kernel = torch.zeros_like(bank[0], dtype=torch.float64)
    for share, expert in zip(shares, bank, strict=True):  # one at a time, as a whole bank in float64 can be large
        kernel += share * expert.double()
    bias = None if bias_bank is None else shares @ bias_bank.double()
    if shift is not None:
        bias = shift.double() if bias is None else bias + shift.double()
    step, size = fold.common_dilation(layer.dilations), kernel.shape[-1]
    channels, padding = (layer.in_channels, len(kernel)), step * (size // 2)
    conv = nn.Conv2d(*channels, size, layer.stride, padding, step, layer.groups, bias is not None, device="meta")
    conv.weight = nn.Parameter(kernel.to(bank.dtype), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.to(bank.dtype), requires_grad=False)
    conv.eval()
    return conv if depthwise.why_not(conv) else DepthwiseConv2d.from_conv2d(conv)


def _listed(parameters: nn.ParameterList) -> list[Tensor]:
    """Return the items, without the ten calls in Python that a ParameterList makes for each."""
    held = parameters._parameters
    try:
        return [held[str(index)] for index in range(len(parameters))]  # type: ignore[misc]
    except KeyError:  # an item is computed, by torch.nn.utils.parametrize for example
        return list(parameters)


def _channels_last(kernel: Tensor) -> bool:
    return kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()


def why_not(conv: nn.Module) -> str | None:
    """Return why ``conv`` cannot become a mixture with "same" alignment, or None if it can."""
    if not isinstance(conv, nn.Conv2d) or type(conv) not in (nn.Conv2d, DepthwiseConv2d):
        return f"it is a {type(conv).__name__}, not a plain torch.nn.Conv2d"
    (height, width), dilation, padding = conv.kernel_size, conv.dilation, conv.padding
    if height != width:
        return f"its kernel is not square ({height}x{width})"
    if height % 2 == 0:
        return f"its kernel size is even ({height}x{width})"
    if conv.stride[0] != conv.stride[1] or dilation[0] != dilation[1]:
        return f"its stride {conv.stride} or dilation {dilation} differs between the axes"
    if conv.padding_mode != "zeros":
        return f"its padding mode is {conv.padding_mode!r}, not 'zeros'"
    same = dilation[0] * (height // 2)
    if padding != "same" and padding != (same, same):
        return f"its padding is {padding}, and {same} would center the kernel on the pixel"
    return None


def lacks_room(conv: nn.Conv2d, kernel_sizes: Sequence[int | Expert]) -> str | None:
    """Return why no expert can hold the kernel of ``conv`` (one that passed :func:`why_not`), or None."""
    size = conv.kernel_size[0]
    if _keeper(_checks.experts(kernel_sizes), size, 1) is not None:
        return None
    return f"no expert of {tuple(kernel_sizes)} can hold its {size}x{size} kernel"


def _inherit(kernel_sizes: Sequence[int | Expert], dilation: int) -> tuple[Expert, ...]:
    return tuple((size, own * dilation) for size, own in _checks.experts(kernel_sizes))


def _keeper(experts: Sequence[Expert], size: int, dilation: int) -> int | None:
    """Return the index of the smallest expert whose taps include those of a kernel of (size, dilation), or None."""
    reach = dilation * (size // 2)
    fits = [
        (d * (k // 2), r)
        for r, (k, d) in enumerate(experts)
        if d * (k // 2) >= reach and (dilation % d == 0 or size == 1)
    ]
    return min(fits)[1] if fits else None


def _regrid(kernel: Tensor, source: Expert, target: Expert) -> Tensor:
    """Move a kernel from the taps of one (size, dilation) to those of another. Taps that it does not have are lost."""
    kernel = fold.dilate(kernel, source[1])
    size = fold.effective_size(*target)
    kernel = fold.crop(fold.pad(kernel, max(size, kernel.shape[-1])), size)
    return kernel[..., :: target[1], :: target[1]]
