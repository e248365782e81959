"""How each kind of module computes when patches are masked: the rules of :mod:`widefield.masking.visibility`.

"Spatial" modules mix positions; their inputs are set to zero at masked positions. Means, norms and statistics over
positions are over the visible ones. Modules that work on every position by itself have no rule.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    BlurPool2d,
    EffectiveSEModule,
    SEModule,
)
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from timm.layers.grn import GlobalResponseNorm
from timm.models._efficientnet_blocks import SqueezeExcite as MobileSqueezeExcite
from timm.models.focalnet import FocalModulation
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widefield.masking.batch_norm import batch_norm
from widefield.masking.visibility import Forward, Rule, Visibility
from widefield.models.unireplknet import SqueezeExcite
from widefield.nn import GRN, MultiOrderGatedAggregation, Router
from widefield.nn.deform import DCNv3, DeformConv2d
from widefield.nn.gmconv import DynamicGMConv2d, GMConv2d, SigmaPredictor
from widefield.nn.gnconv import GlobalLocalFilter
from widefield.nn.morf import FusedMoRFConv2d, MoRFConv2d

_JAX_EPS = 1e-6


def _spatial(module: Any, visible: Visibility, forward: Forward, x: Tensor) -> Tensor:
    return forward(x * visible.at(x))


def _group_norm(module: Any, visible: Visibility, forward: Forward, x: Tensor) -> Tensor:
    seen = visible.at(x)[:, :, None]
    groups = x.unflatten(1, (module.num_groups, -1))
    count = seen.sum((2, 3, 4), keepdim=True) * groups.shape[2]
    mean = (groups * seen).sum((2, 3, 4), keepdim=True) / count
    centered = groups - mean
    variance = (centered.square() * seen).sum((2, 3, 4), keepdim=True) / count
    y: Tensor = (centered * (variance + module.eps).rsqrt()).flatten(1, 2)
    if module.weight is None:
        return y
    y = y * module.weight[:, None, None] + module.bias[:, None, None]
    out: Tensor = getattr(module, "act", nn.Identity())(getattr(module, "drop", nn.Identity())(y))
    return out


def _response_norm(module: Any, visible: Visibility, forward: Forward, x: Tensor) -> Tensor:
    """Take the norm over visible positions: those that are masked are zero."""
    last = getattr(module, "channel_dim", -1) == -1
    x = x * visible.at(x, channels_last=last)
    if visible.grn == "image":
        return forward(x)
    positions = (1, 2) if last else (2, 3)
    over = (0, *positions) if visible.grn == "batch" else positions
    if visible.grn == "jax":
        norm = (x.square().sum(over, keepdim=True) + _JAX_EPS).sqrt()
    else:
        norm = torch.linalg.vector_norm(x, dim=over, keepdim=True)
    ratio = norm / (norm.mean(-1 if last else 1, keepdim=True) + module.eps)
    if isinstance(module, GRN):
        weight, bias = module.gamma, 0.0 if module.beta is None else module.beta
    else:
        weight, bias = (p.view(module.wb_shape) for p in (module.weight, module.bias))
    y: Tensor = x + bias + weight * (x * ratio)
    return y


def _max_pool(module: Any, visible: Visibility, forward: Forward, x: Tensor) -> Tensor:
    """Compare visible positions only. After a ReLU this is what zeros at masked ones give."""
    y = forward(torch.where(visible.positions(x), x, -torch.inf))  # masked_fill would lose channels_last
    return torch.where(visible.positions(y), y, 0.0)  # windows without a visible position


def _average_pool(module: Any, visible: Visibility, forward: Forward, x: Tensor) -> Tensor:
    seen = visible.at(x)
    share = forward(seen)
    return forward(x * seen) / torch.where(share > 0, share, 1.0)


def _adaptive_pool(module: Any, visible: Visibility, forward: Forward, x: Tensor) -> Tensor:
    return forward(visible.mean(x))


def _squeeze(module: Any, visible: Visibility, forward: Forward, x: Tensor) -> Tensor:
    """Gate the channels by the means over visible positions."""
    mean = visible.mean(x)
    if getattr(module, "add_maxpool", False):
        mean = 0.5 * mean + 0.5 * _largest(x, visible)
    if isinstance(module, MobileSqueezeExcite):
        gates = module.gate(module.conv_expand(module.act1(module.conv_reduce(mean))))
    elif isinstance(module, SqueezeExcite):
        gates = module.up(F.relu(module.down(mean))).sigmoid()
    elif isinstance(module, EffectiveSEModule):
        gates = module.gate(module.fc(mean))
    else:
        gates = module.gate(module.fc2(module.act(module.bn(module.fc1(mean)))))
    y: Tensor = x * gates
    return y


def _largest(x: Tensor, visible: Visibility) -> Tensor:
    return torch.where(visible.positions(x), x, -torch.inf).amax((2, 3), keepdim=True)


def _router(module: Any, visible: Visibility, forward: Forward, x: Tensor) -> Tensor:
    return forward(visible.mean(x))  # the mean of a map of one pixel is that pixel


def _sigmas(module: Any, visible: Visibility, forward: Forward, x: Tensor) -> Tensor:
    """Give the module two pixels with the same maximum and mean as the visible positions."""
    largest, mean = _largest(x, visible), visible.mean(x)
    return forward(torch.cat((largest, 2 * mean - largest), 3))


def _gated_aggregation(module: Any, visible: Visibility, forward: Forward, x: Tensor) -> Tensor:
    y = module.proj_1(x)
    y = F.silu(module.sigma(y, visible.mean(y)))
    out: Tensor = x + module.proj_2(F.silu(module.gate(y)) * F.silu(module.value(y)))
    return out


def _focal(module: Any, visible: Visibility, forward: Forward, x: Tensor) -> Tensor:
    query, context, gates = module.f(x).split(module.input_split, 1)
    gates = gates.unbind(1)
    total = 0
    for layer, gate in zip(module.focal_layers, gates, strict=False):
        context = layer(context)
        total = total + context * gate[:, None]
    total = total + module.act(visible.mean(context)) * gates[-1][:, None]
    if module.normalize_modulator:
        total = total / (module.focal_level + 1)
    out: Tensor = module.proj_drop(module.proj(module.norm(query * module.h(total))))
    return out


def _filter(module: Any, visible: Visibility, forward: Forward, x: Tensor) -> Tensor:
    near, far = module.pre_norm(x).chunk(2, 1)
    mixed = module.filtered(far * visible.at(far))
    out: Tensor = module.post_norm(torch.stack((module.dw(near), mixed), 2).flatten(1, 2))
    return out


def _deformable(module: Any, visible: Visibility, forward: Forward, x: Tensor) -> Tensor:
    """Sample values that are zero at masked positions."""
    first = isinstance(module, DeformConv2d)
    x = x.permute(0, 2, 3, 1) if first else x
    y: Tensor = module.sampled(module.features(x), module.input_proj(x) * visible.at(x, channels_last=True))
    return y.permute(0, 3, 1, 2) if first else y


SPATIAL = Rule("masked positions of its input are 0", _spatial)
MIXED = Rule("masked positions of its input are 0", _spatial, inside=True)
STATISTICS = Rule("statistics over visible positions in training mode", batch_norm)
GATES = Rule("gates from the means over visible positions", _squeeze)

_RULES: dict[type[nn.Module], Rule] = {
    nn.ConvTranspose2d: SPATIAL,
    GMConv2d: SPATIAL,
    DynamicGMConv2d: MIXED,
    MoRFConv2d: MIXED,
    FusedMoRFConv2d: MIXED,
    Router: Rule("mean over visible positions", _router),
    SigmaPredictor: Rule("mean and maximum over visible positions", _sigmas),
    BlurPool2d: SPATIAL,
    nn.MaxPool2d: Rule("maximum over visible positions", _max_pool),
    nn.AvgPool2d: Rule("mean over visible positions", _average_pool),
    nn.AdaptiveAvgPool2d: Rule("mean over visible positions", _adaptive_pool),
    FastAdaptiveAvgPool: Rule("mean over visible positions", _adaptive_pool),
    _BatchNorm: STATISTICS,
    nn.GroupNorm: Rule("statistics over visible positions", _group_norm),
    GRN: Rule("norm over visible positions", _response_norm),
    GlobalResponseNorm: Rule("norm over visible positions", _response_norm),
    SEModule: GATES,
    EffectiveSEModule: GATES,
    MobileSqueezeExcite: GATES,
    SqueezeExcite: GATES,
    MultiOrderGatedAggregation: Rule("mean over visible positions", _gated_aggregation, inside=True),
    FocalModulation: Rule("mean over visible positions", _focal, inside=True),
    DCNv3: Rule("masked positions of the sampled values are 0", _deformable, inside=True),
    GlobalLocalFilter: Rule("masked positions of the filter's input are 0", _filter, inside=True),
}
"""Class -> rule; subclasses have it, too."""


def rule_of(module: nn.Module) -> Rule | None:
    """Return the rule of a module, or None if it works on every position by itself or only calls others."""
    if isinstance(module, nn.Conv2d):
        return None if max(module.kernel_size) == 1 else SPATIAL
    return next((_RULES[kind] for kind in type(module).__mro__ if kind in _RULES), None)
