"""MetaFormer: one architecture for all token mixers, to compare mixers with everything else equal.

Papers: Yu et al., "MetaFormer Is Actually What You Need for Vision", CVPR 2022, section 3.1 (a block is a token mixer
and a channel mixer, each after a norm and in a residual connection); stem, downsampling, widths and depths are those of
Liu et al., "A ConvNet for the 2020s", CVPR 2022. timm's MetaFormer has one channel mixer and its own token mixers; this
one accepts any module (N, C, H, W) -> (N, C, H, W) for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from timm.layers import DropPath, GroupNorm1, LayerNorm2d, LayerScale2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from widefield import _checks
from widefield.models._backbone import Backbone, initialize_truncated
from widefield.models._registry import Stated, build, cfg
from widefield.nn.mixers import CHANNEL_MIXERS, TOKEN_MIXERS

STATED = dict.fromkeys(
    ("metaformer_tiny", "metaformer_small", "metaformer_base"),
    Stated("not stated", "not stated", "a comparison of its own: see docs/metaformer.md"),
)

Mixer = str | Callable[[int], nn.Module]
"""A name, or a callable that takes the number of channels and returns a module."""


NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": GroupNorm1,
    "layer": partial(LayerNorm2d, eps=1e-6),
}
"""Name -> callable of the channels: batch norm, group norm with one group (PoolFormer's), LayerNorm over channels."""


class MetaFormerBlock(nn.Module):
    """A token mixer and a channel mixer, each after a norm and in a residual connection; CVPR 2022, eq. 2 and 3.

    Args:
        token_mixer, channel_mixer: (N, C, H, W) -> the same.
        norm: callable of the channels.
        width: channels.
        layer_scale: initial value of the factors of both branches; 0 for none.
        drop_path: probability that a sample skips a branch in training.
    """

    def __init__(
        self,
        token_mixer: nn.Module,
        channel_mixer: nn.Module,
        norm: Callable[[int], nn.Module],
        width: int,
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1, self.token_mixer = norm(width), token_mixer
        self.norm2, self.channel_mixer = norm(width), channel_mixer
        self.scale1, self.scale2 = (
            LayerScale2d(width, layer_scale) if layer_scale else nn.Identity() for _ in range(2)
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = x + self.drop_path(self.scale1(self.token_mixer(self.norm1(x))))
        out: Tensor = x + self.drop_path(self.scale2(self.channel_mixer(self.norm2(x))))
        return out


class MetaFormer(Backbone):
    """Four stages of :class:`MetaFormerBlock`; ConvNeXt-T's sizes with the default arguments.

    Args:
        in_chans, num_classes, global_pool, drop_rate: see :class:`widefield.models._backbone.Backbone`.
        drop_path_rate: of the last block; it grows linearly from 0 at the first.
        depths: blocks of each stage.
        widths: channels of each stage.
        token_mixer: a name of :data:`widefield.nn.mixers.TOKEN_MIXERS`; or a callable that takes the channels and
            returns a module (N, C, H, W) -> (N, C, H, W); or one of these for each stage.
        channel_mixer: the same, with the names of :data:`widefield.nn.mixers.CHANNEL_MIXERS`.
        norm: a name of :data:`NORMS`.
        layer_scale: initial value of the factors of each branch; 0 for none.
        expansion: hidden channels of named channel mixers, in units of the width.

    Raises:
        TypeError, ValueError: an unknown name; mixers, depths and widths differ in number.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (3, 3, 9, 3),
        widths: Sequence[int] = (96, 192, 384, 768),
        token_mixer: Mixer | Sequence[Mixer] = "conv",
        channel_mixer: Mixer | Sequence[Mixer] = "mlp",
        norm: str = "layer",
        layer_scale: float = 1e-6,
        expansion: float = 4.0,
    ) -> None:
        super().__init__(
            widths, in_chans=in_chans, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate
        )
        layer_scale = _checks.number("layer_scale", layer_scale)
        expansion = _checks.number("expansion", expansion)
        norms = NORMS[_checks.choice("norm", norm, tuple(NORMS))]
        if len(depths) != len(widths):
            raise ValueError(f"depths and widths must be as many; got {tuple(depths)} and {tuple(widths)}.")
        token_mixers = _each("token_mixer", token_mixer, TOKEN_MIXERS, len(depths))
        channel_mixers = _each("channel_mixer", channel_mixer, CHANNEL_MIXERS, len(depths))
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.transitions = nn.ModuleList(
            nn.Sequential(nn.Conv2d(self.in_chans, widths[0], 4, 4), norms(widths[0]))
            if index == 0
            else nn.Sequential(norms(widths[index - 1]), nn.Conv2d(widths[index - 1], width, 2, 2))
            for index, width in enumerate(widths)
        )
        self.stages = nn.ModuleList()
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = (
                MetaFormerBlock(
                    _made(token_mixers[index], TOKEN_MIXERS, width, index),
                    _made(channel_mixers[index], CHANNEL_MIXERS, width, int(expansion * width)),
                    norms,
                    width,
                    layer_scale,
                    rates[index][block],
                )
                for block in range(_checks.integer("every entry of depths", depth))
            )
            self.stages.append(nn.Sequential(*blocks))
        self.norm: nn.Module = norms(widths[-1])
        self.head = self.classifier()
        self._initialize()

    def _initialize(self) -> None:
        """Initialize as ConvNeXt does, except inside token mixers, which initialize themselves."""
        inside = {
            m for block in self.modules() if isinstance(block, MetaFormerBlock) for m in block.token_mixer.modules()
        }
        for module in self.modules():
            if module not in inside:
                initialize_truncated(module)

    def enter(self, index: int, x: Tensor) -> Tensor:
        """Return the input of a stage."""
        y: Tensor = self.transitions[index](x)
        return y

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Return the feature of a stage."""
        return self.run(self.stages[index], x)  # type: ignore[arg-type]

    def parts(self, index: int) -> tuple[str, ...]:
        """Return the submodules of a stage."""
        return f"stages.{index}", f"transitions.{index}"

    def finish(self, x: Tensor) -> Tensor:
        """Return the last feature, normalized."""
        y: Tensor = self.norm(x)
        return y

    def unfinish(self) -> None:
        """Remove the norm."""
        self.norm = nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's groups of parameters, for layer-wise learning rates."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {
            "stem": r"^transitions\.0",
            "blocks": [(r"^transitions\.(\d+)", (0,)), (blocks, None), (r"^norm", (99999,))],
        }


def _each(name: str, given: Any, known: Mapping[str, Any], count: int) -> list[Mixer]:
    """Return a mixer for each stage; raises ValueError for unknown names."""
    each = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * count
    if len(each) != count:
        raise ValueError(f"{name} must be one mixer, or one for each of {count} stages; got {len(each)}.")
    for mixer in each:
        if isinstance(mixer, nn.Module) or not callable(mixer):  # all blocks would share a module instance
            _checks.choice(name, mixer, tuple(known))
    return each


def _made(mixer: Mixer, known: Mapping[str, Callable[[int, int], nn.Module]], width: int, more: int) -> nn.Module:
    return known[mixer](width, more) if isinstance(mixer, str) else mixer(width)


default_cfgs = generate_default_cfgs({name: cfg("transitions.0.0") for name in STATED})


@register_model
def metaformer_tiny(pretrained: bool = False, **kwargs: Any) -> MetaFormer:
    """MetaFormer with ConvNeXt-T's sizes."""
    return build(MetaFormer, "metaformer_tiny", pretrained, **kwargs)  # type: ignore[no-any-return]


@register_model
def metaformer_small(pretrained: bool = False, **kwargs: Any) -> MetaFormer:
    """MetaFormer with ConvNeXt-S's sizes."""
    model_args = {"depths": (3, 3, 27, 3), **kwargs}
    return build(MetaFormer, "metaformer_small", pretrained, **model_args)  # type: ignore[no-any-return]


@register_model
def metaformer_base(pretrained: bool = False, **kwargs: Any) -> MetaFormer:
    """MetaFormer with ConvNeXt-B's sizes."""
    model_args = {"depths": (3, 3, 27, 3), "widths": (128, 256, 512, 1024), **kwargs}
    return build(MetaFormer, "metaformer_base", pretrained, **model_args)  # type: ignore[no-any-return]
