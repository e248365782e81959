"""Layers that `mixtures.py` compares with the library's mixtures: controls, and mixtures with one thing changed.

Importing this module registers the conversions `constants`, `excited` and `changed` for recipes.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from widefield import ops, surgery
from widefield.nn import DepthwiseConv2d, MoRFConv2d, Router
from widefield.nn.fusing import exact_affine
from widefield.ops import fold
from widefield.surgery import Conversion
from widefield.train import recipe


def sized(kernel_sizes: tuple[int, ...], like: nn.Conv2d, **options: Any) -> MoRFConv2d:
    """Return a depthwise mixture in place of a convolution, with kernels of its own initialization."""
    return MoRFConv2d.from_conv2d(like, kernel_sizes, **{"init": "random", **options})


# Controls


class ConstantMixture(nn.Module):
    """Experts mixed by learned constants, the softmax of free parameters, instead of a router: static branches."""

    def __init__(self, mixture: MoRFConv2d) -> None:
        super().__init__()
        self.expert_weights, self.expert_biases = mixture.expert_weights, mixture.expert_biases
        self.logits = nn.Parameter(torch.zeros(len(mixture.kernel_sizes)))

    def mixed(self) -> tuple[Tensor, Tensor]:
        """Return kernel (C, 1, K, K) and bias (C,)."""
        shares = self.logits.softmax(0)
        bank = fold.kernel_bank(list(self.expert_weights), [1] * len(shares))
        biases = torch.stack(list(self.expert_biases))
        return torch.einsum("r,r...->...", shares, bank), shares @ biases

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.mixed()
        return ops.depthwise_conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def fuse(self) -> nn.Module:
        """Return the one convolution that it is."""
        weight, bias = self.mixed()
        conv = DepthwiseConv2d(len(weight), len(weight), weight.shape[-1], padding=weight.shape[-1] // 2)
        conv.weight, conv.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        return conv.eval()


@dataclasses.dataclass(frozen=True)
class Constants(Conversion):
    """Mix experts by learned constants."""

    layers = (ConstantMixture,)
    kernel_sizes: tuple[int, ...] = (3, 7, 11)

    def _why_not(self, module: nn.Module) -> str | None:
        return surgery.FastDepthwise().why_not(module)

    def _replace(self, conv: nn.Conv2d) -> nn.Module:
        return ConstantMixture(sized(tuple(self.kernel_sizes), conv))


@dataclasses.dataclass(frozen=True)
class Excited(Conversion):
    """Put a squeeze-excitation (Hu et al. 2018) as wide as a router behind a convolution."""

    layers = (SqueezeExcite,)
    width: int = 16

    def _why_not(self, module: nn.Module) -> str | None:
        return surgery.FastDepthwise().why_not(module)

    def _replace(self, conv: nn.Conv2d) -> nn.Module:
        excite = SqueezeExcite(conv.out_channels, rd_channels=self.width)
        return nn.Sequential(DepthwiseConv2d.from_conv2d(conv), excite)


# Mixtures with one change


class ChangedRouter(Router):
    """A router with one change. The words of ``change``, joined by "+", mean:

    norm: a layer norm over the pooled vector. std: standard deviations of the channels next to their means.
    scale: weights times sqrt(n), so that n independent experts begin with the variance of one. shares: weights divided
    by the sum of their absolute values. warm-up: even weights in the first ``steps`` steps of training. annealed: a
    temperature that falls from 30 to 1 in them, as in Dynamic Convolution (Chen et al. 2020, section 3.3).
    """

    def __init__(self, like: Router, change: str, steps: int) -> None:
        self.words, self.steps = change.split("+"), steps
        features = like.hidden.in_features * (2 if "std" in self.words else 1)
        super().__init__(features, like.experts, width=like.hidden.out_features, attention=like.attention)
        self.norm = nn.LayerNorm(features) if "norm" in self.words else nn.Identity()
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3))
        if "std" in self.words:
            pooled = torch.cat([pooled, x.std((2, 3))], 1)
        logits = self.gate(nn.functional.gelu(self.hidden(self.norm(pooled))))
        weights = self._weigh(logits / self._temperature())
        if "scale" in self.words:
            weights = weights * self.experts**0.5
        if "shares" in self.words:
            weights = weights / weights.abs().sum(1, keepdim=True).clamp(min=1e-3)
        if self.training:
            self.seen += 1
            if "warm-up" in self.words and self.seen <= self.steps:
                weights = torch.full_like(weights, 1 / self.experts) + 0 * weights
        return weights

    def _temperature(self) -> float:
        if "annealed" not in self.words:
            return 1.0
        return 1 + 29 * max(0.0, 1 - float(self.seen) / self.steps)


class WithBranch(nn.Module):
    """A mixture and a 3x3 convolution with batch norm next to it: RepLKNet's small branch (Ding et al. 2022).

    In evaluation the branch is a 3x3 kernel and a bias, so it folds into every expert if the weights sum to 1, and else
    it is one more expert whose weight is always 1. ``fused`` does so.
    """

    def __init__(self, mixture: MoRFConv2d) -> None:
        super().__init__()
        channels = mixture.in_channels
        self.mixture = mixture
        self.small = DepthwiseConv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixture(x) + self.norm(self.small(x))

    @torch.no_grad()
    def fused(self) -> MoRFConv2d:
        """Return the mixture that computes the same in evaluation mode."""
        scale, shift = exact_affine(self.norm)
        kernel, shift = (self.small.weight * scale[:, None, None, None]).float(), shift.float()
        whole = self.mixture
        if whole.router.attention == "softmax":
            merged = copy.deepcopy(whole)
            for weight, bias in zip(merged.expert_weights, merged.expert_biases, strict=True):
                weight += fold.pad(kernel, weight.shape[-1])
                bias += shift
            return merged
        merged = sized((*whole.kernel_sizes, 3), _plain(whole), attention="none")
        for own, old in zip(merged.expert_weights, [*whole.expert_weights, kernel], strict=True):
            own.copy_(old)
        for own, old in zip(merged.expert_biases, [*whole.expert_biases, shift], strict=True):
            own.copy_(old)
        gate, old = merged.router.gate, whole.router.gate
        merged.router.hidden.load_state_dict(whole.router.hidden.state_dict())
        gate.weight.copy_(torch.cat([old.weight, torch.zeros_like(old.weight[:1])]))
        gate.bias.copy_(torch.cat([old.bias, torch.ones_like(old.bias[:1])]))
        return merged.eval()


class NormedExperts(nn.Module):
    """A mixture with a batch norm behind each expert, which folds into the expert's kernel after training.

    Training convolves with every expert on its own.
    """

    def __init__(self, mixture: MoRFConv2d) -> None:
        super().__init__()
        self.mixture = mixture
        self.norms = nn.ModuleList(nn.BatchNorm2d(mixture.out_channels) for _ in mixture.kernel_sizes)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.mixture.route(x)
        branches = [
            norm(ops.depthwise_conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2))
            for norm, kernel, bias in zip(self.norms, self.mixture.kernels(), self.mixture.biases(), strict=True)
        ]
        return torch.einsum("nr,rnchw->nchw", weights, torch.stack(branches))

    @torch.no_grad()
    def fused(self) -> MoRFConv2d:
        """Return the mixture that computes the same in evaluation mode."""
        merged = copy.deepcopy(self.mixture)
        for norm, weight, bias in zip(self.norms, merged.expert_weights, merged.expert_biases, strict=True):
            scale, shift = exact_affine(norm)
            weight.copy_(weight * scale[:, None, None, None])
            bias.copy_(bias * scale + shift)
        return merged


def _plain(mixture: MoRFConv2d) -> nn.Conv2d:
    channels = mixture.in_channels
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels).eval()


@dataclasses.dataclass(frozen=True)
class Changed(Conversion):
    """Mix experts with one change: see :class:`ChangedRouter`; "branch": :class:`WithBranch`; "expert norms"."""

    layers = (MoRFConv2d,)
    change: str = "norm"
    kernel_sizes: tuple[int, ...] = (3, 7, 11)
    attention: str = "softmax"
    steps: int = 1

    def _why_not(self, module: nn.Module) -> str | None:
        return surgery.FastDepthwise().why_not(module)

    def _replace(self, conv: nn.Conv2d) -> nn.Module:
        mixture = sized(tuple(self.kernel_sizes), conv, attention=self.attention)
        if self.change == "branch":
            return WithBranch(mixture)
        if self.change == "expert norms":
            return NormedExperts(mixture)
        mixture.router = ChangedRouter(mixture.router, self.change, self.steps)
        return mixture


for _kind, _config in {"constants": Constants, "excited": Excited, "changed": Changed}.items():
    setattr(surgery, _config.__name__, _config)
    recipe.CONVERSIONS[_kind] = _config.__name__
