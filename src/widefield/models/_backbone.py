"""Provide the base classes of all backbones, with the interface that timm requires."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from widefield import _checks
from widefield.nn.recompute import recomputed


class Backbone(nn.Module):
    """Stages that each halve the map, a pooled vector, and a linear layer ``head``.

    A family defines :meth:`enter`, :meth:`stage`, :meth:`parts`, and if needed :meth:`finish` and :meth:`pooled`. It
    sets ``self.head = self.classifier()`` at the position of its official keys.

    Args:
        widths: channels of the feature of each stage.
        in_chans: image channels.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: timm's name of the pooling: "avg", "max", "avgmax", "catavgmax", "fast" or "" (none).
        drop_rate: dropout before the classifier.
        hidden: length of the pooled vector. Default: the last of ``widths``.
    """

    head: nn.Module
    feature_info: list[dict[str, Any]]

    def __init__(
        self,
        widths: Sequence[int],
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.in_chans = _checks.integer("in_chans", in_chans)
        self.num_classes = _checks.integer("num_classes", num_classes, minimum=0)
        self.drop_rate = _checks.number("drop_rate", drop_rate, maximum=1.0)
        self.num_features = widths[-1] if hidden is None else hidden
        self.head_hidden_size = self.num_features
        self.grad_checkpointing = False
        self.pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.feature_info = [
            {"num_chs": width, "reduction": 4 << i, "module": self.parts(i)[0]} for i, width in enumerate(widths)
        ]

    # Defined by a family

    def enter(self, index: int, x: Tensor) -> Tensor:
        """Return the input of a stage: from the image for the first, from the previous feature for the others."""
        raise NotImplementedError

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Return the feature (N, C, H, W) of a stage from its input."""
        raise NotImplementedError

    def parts(self, index: int) -> tuple[str, ...]:
        """Return the names of the submodules that earlier stages do not need, with the stage itself first."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """Return the map that is pooled, from the last feature."""
        return x

    def pooled(self, x: Tensor) -> Tensor:
        """Return the input of the classifier, from the pooled vector (or the map if nothing is pooled)."""
        return x

    # Required by timm

    def classifier(self) -> nn.Module:
        """Return a new head for ``num_classes``."""
        features = self.num_features * self.pool.feat_mult()
        return nn.Linear(features, self.num_classes) if self.num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head with a freshly initialized one; 0 classes: none."""
        self.num_classes = _checks.integer("num_classes", num_classes, minimum=0)
        if global_pool is not None:
            self.pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        like = next(self.parameters())
        self.head = self.classifier().to(like)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable checkpointing: training keeps only the inputs of blocks and recomputes the rest in backward passes.

        Outputs, gradients and the statistics of batch norms are the same.
        """
        self.grad_checkpointing = enable

    def run(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        """Run the blocks of a stage, with checkpointing if enabled."""
        if self.grad_checkpointing and self.training:
            return recomputed(blocks, x)
        out: Tensor = blocks(x)
        return out

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> the map that is pooled, (N, num_features, H/32, W/32)."""
        for index in range(len(self.feature_info)):
            x = self.stage(index, self.enter(index, x))
        return self.finish(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map of :meth:`forward_features` -> logits (N, num_classes), or with ``pre_logits`` the classifier's input."""
        x = self.pooled(self.pool(x))
        x = F.dropout(x, self.drop_rate, self.training)
        if pre_logits or isinstance(self.head, nn.Identity):
            return x
        if x.ndim == 4:  # global_pool="": logits of every pixel
            return self._at_every_pixel(x)
        out: Tensor = self.head(x)
        return out

    def _at_every_pixel(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the features of stages, each (N, C, H, W): alone, or after the map of :meth:`forward_features`.

        Args:
            x: (N, in_chans, H, W).
            indices: which stages; an integer n: the last n. Default: all.
            norm: return the last feature as :meth:`forward_features` does.
            stop_early: stop after the last requested stage; the first return value is then that stage's feature.
            output_fmt: "NCHW".
            intermediates_only: return only the list.

        Raises:
            ValueError: another output format.
        """
        _checks.choice("output_fmt", output_fmt, ("NCHW",))
        last = len(self.feature_info) - 1
        taken, deepest = feature_take_indices(last + 1, indices)
        features = []
        for index in range((deepest if stop_early or intermediates_only else last) + 1):
            x = self.stage(index, self.enter(index, x))
            if index in taken:
                features.append(self.finish(x) if norm and index == last else x)
        if intermediates_only:
            return features
        return (self.finish(x) if index == last else x), features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the modules that the features of these stages do not need; return the stages' indices."""
        count = len(self.feature_info)
        taken, deepest = feature_take_indices(count, indices)
        for index in range(deepest + 1, count):
            for name in self.parts(index):
                self.set_submodule(name, nn.Identity())
        self.feature_info = self.feature_info[: deepest + 1]
        if prune_head or deepest + 1 < count:
            self.reset_classifier(0, "")
            self.unfinish()
        return list(taken)

    def unfinish(self) -> None:
        """Remove the modules of :meth:`finish` and :meth:`pooled`."""


class NormedBackbone(Backbone):
    """A :class:`Backbone` that ends like ConvNeXt, in a norm over the channels of the pooled vector, ``norm``.

    The family sets ``self.norm`` and applies :func:`initialize_truncated` to itself.
    """

    norm: nn.Module
    head_init_scale: float = 1.0
    """Factor of the classifier's initial weights."""

    def pooled(self, x: Tensor) -> Tensor:
        """Normalize the pooled vector (with "catavgmax" each half of it), or each pixel if nothing is pooled."""
        halves = x.unflatten(1, (self.pool.feat_mult(), -1)).movedim(2, -1)
        y: Tensor = self.norm(halves).movedim(-1, 2).flatten(1, 2)
        return y

    def unfinish(self) -> None:
        """Remove the last norm."""
        self.norm = nn.Identity()

    def classifier(self) -> nn.Module:
        """Return a new head, initialized like the rest of the network and scaled."""
        head = super().classifier().apply(initialize_truncated)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.mul_(self.head_init_scale)
        return head


def initialize_truncated(module: nn.Module) -> None:
    """Initialize as the code of ConvNeXt and its successors does: truncated normals of 0.02, biases of 0."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        _truncated(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def initialize_fan_out(module: nn.Module) -> None:
    """Initialize as the code of VAN and MogaNet does: convolutions by their fan-out, linear layers by 0.02."""
    if isinstance(module, nn.Linear):
        _truncated(module.weight)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _truncated(weight: Tensor) -> None:
    if not weight.is_meta:  # without values, timm's function only takes time: milliseconds for each layer
        trunc_normal_(weight, std=0.02)
