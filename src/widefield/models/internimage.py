"""InternImage: transformer blocks with a deformable convolution in place of attention.

Paper: Wang et al., "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions", CVPR
2023, section 3. Keys, initialization and variants are those of the official code (github.com/OpenGVLab/InternImage,
MIT), whose weights load.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, Mlp
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from widefield import _checks
from widefield.models._backbone import Backbone, initialize_truncated
from widefield.models._internimage_head import AttentionPool, ConvHead, layer_norm
from widefield.models._registry import Stated, build, cfg
from widefield.nn.deform import DCNv3, keyed

__all__ = ["InternImage", "InternImageH"]

_PAPER = "the paper, table 2"

STATED: dict[str, Stated] = {
    "internimage_t": Stated("30M", "5G", _PAPER),
    "internimage_s": Stated("50M", "8G", _PAPER),
    "internimage_b": Stated("97M", "16G", _PAPER),
    "internimage_l": Stated("223M", "108G at 384", _PAPER),
    "internimage_xl": Stated("335M", "163G at 384", _PAPER),
    "internimage_h": Stated("1.08B", "1478G at 640", _PAPER),
    "internimage_g": Stated("3B", "2700G at 512", "the official repository"),
}
"""Counts stated for each network."""

NORMS = ("pre", "post", "both")
"""Position of a block's norms: before its layers, after them, or both."""

SCHEDULES = ("linear", "uniform")


class Block(nn.Module):
    """A deformable convolution, then an MLP, each in a residual connection: (N, H, W, C) -> the same.

    Args:
        width: C.
        groups, mlp_ratio, norms, layer_scale_init: see :class:`InternImage`.
        drop_path: probability that a sample skips a branch in training.
        options: of :class:`widefield.nn.deform.DCNv3`.
    """

    def __init__(
        self,
        width: int,
        groups: int,
        *,
        mlp_ratio: float = 4.0,
        norms: str = "pre",
        layer_scale_init: float | None = None,
        drop_path: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.norms = norms
        for name in ("gamma1", "gamma2"):
            scale = None if layer_scale_init is None else nn.Parameter(torch.full((width,), layer_scale_init))
            self.register_parameter(name, scale)
        self.norm1 = layer_norm(width)
        self.dcn = DCNv3(width, groups=groups, **options)
        self.drop_path = DropPath(drop_path)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        if norms == "both":
            self.res_post_norm1 = layer_norm(width)
            self.res_post_norm2 = layer_norm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        return self._branch(self._branch(x, self.dcn, "1"), self.mlp, "2")

    def _branch(self, x: Tensor, layer: nn.Module, number: str) -> Tensor:
        norm, scale = getattr(self, f"norm{number}"), getattr(self, f"gamma{number}")
        y = norm(layer(x)) if self.norms == "post" else layer(norm(x))
        if self.norms == "both":
            y = getattr(self, f"res_post_norm{number}")(y)
        if scale is not None:
            y = scale * y
        out: Tensor = x + self.drop_path(y)
        return out


class Level(nn.Module):
    """The blocks of one resolution, the norms between and after them, and the downsampling to the next.

    Args:
        blocks: the blocks.
        width: their channels.
        has_norm: whether a norm follows the last block.
        norms_after: indices of blocks that are followed by a norm.
        next_width: channels of the next level, or None for the last one.
    """

    def __init__(
        self, blocks: Sequence[Block], width: int, has_norm: bool, norms_after: Sequence[int], next_width: int | None
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        if has_norm:
            self.norm = layer_norm(width)
        self.norms_after = tuple(norms_after)
        if self.norms_after:
            self.post_norms = nn.ModuleList(layer_norm(width) for _ in self.norms_after)
        if next_width is not None:
            conv = nn.Conv2d(width, next_width, 3, stride=2, padding=1, bias=False)
            self.downsample = nn.Sequential(OrderedDict(conv=conv, norm=keyed(1, LayerNorm2d(next_width))))

    def runs(self) -> Iterator[nn.Module]:
        """Yield sequences of blocks and norms, in the order in which they are applied."""
        ends = [index + 1 for index in self.norms_after]
        for place, (start, end) in enumerate(pairwise((0, *ends))):
            yield self.blocks[start:end]
            yield self.post_norms[place]
        rest = self.blocks[ends[-1] :] if ends else self.blocks
        if len(rest):
            yield rest
        if hasattr(self, "norm"):
            yield self.norm


class InternImage(Backbone):
    """InternImage-T with the default arguments.

    Maps inside the stages are channels last; features are (N, C, H, W). Dropout (``drop_rate``) acts before the
    classifier; the official code has it after the stem and in the MLPs, where no configuration uses it.

    Args:
        in_chans, num_classes, global_pool, drop_rate: see :class:`widefield.models._backbone.Backbone`.
        drop_path_rate: probability to skip the branches of the last block in training. The paper uses 0.1, 0.4 and 0.5
            for T, S and B, 0.1 and 0.2 for fine-tuning L and XL.
        depths, widths: blocks and channels of each stage.
        groups: of each stage's deformable convolutions.
        mlp_ratio: hidden width of the MLPs in units of the stage's width.
        norms: position of a block's norms, "pre", "post" or "both". Stages end in a norm unless it is "post".
        layer_scale_init: initial value of the factors of each branch; None for none.
        drop_path_type: "linear": from 0 at the first block; "uniform": the same for all.
        head_factor: channels of the map that is pooled, in units of the last width.
        norms_after: blocks of the third stage that are followed by a norm, by index from 0 (InternImage-H).
        offset_scale, dw_kernel_size, center_feature_scale, remove_center, backend: of
            :class:`widefield.nn.deform.DCNv3`. With ``center_feature_scale`` every stage ends in a norm.

    Raises:
        TypeError, ValueError: depths, widths and groups differ in number; numbers out of range; unknown options;
            ``layer_scale_init`` with norms "both", for which it is not defined.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (4, 4, 18, 4),
        widths: Sequence[int] = (64, 128, 256, 512),
        groups: Sequence[int] = (4, 8, 16, 32),
        mlp_ratio: float = 4.0,
        norms: str = "pre",
        layer_scale_init: float | None = None,
        drop_path_type: str = "linear",
        head_factor: float = 1.5,
        norms_after: Sequence[int] = (),
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        backend: str = "auto",
    ) -> None:
        if not len(depths) == len(widths) == len(groups):
            raise ValueError(
                f"depths, widths and groups must have one entry a stage each; got {tuple(depths)}, {tuple(widths)} and "
                f"{tuple(groups)}."
            )
        norms = _checks.choice("norms", norms, NORMS)
        if norms == "both" and layer_scale_init is not None:
            raise ValueError(f"norms='both' has no layer scale; got layer_scale_init={layer_scale_init}. Use None.")
        scale = None if layer_scale_init is None else _checks.number("layer_scale_init", layer_scale_init)
        factor = _checks.number("head_factor", head_factor)
        hidden = _checks.integer("the last of widths times head_factor", int(widths[-1] * factor))
        norms_after = _indices(norms_after, depths[2] if len(depths) > 2 else 0)
        rates = _drop_path_rates(drop_path_rate, drop_path_type, sum(depths))
        super().__init__(
            widths,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            hidden=hidden,
        )

        stem = OrderedDict(
            conv1=nn.Conv2d(self.in_chans, widths[0] // 2, 3, stride=2, padding=1),
            norm1=keyed(1, LayerNorm2d(widths[0] // 2)),
            act=nn.GELU(),
            conv2=nn.Conv2d(widths[0] // 2, widths[0], 3, stride=2, padding=1),
            norm2=keyed(1, LayerNorm2d(widths[0])),
        )
        self.patch_embed = nn.Sequential(stem)
        self.levels = nn.ModuleList()
        for i, (depth, width, following) in enumerate(zip(depths, widths, (*widths[1:], None), strict=True)):
            blocks = [
                Block(
                    width,
                    groups[i],
                    mlp_ratio=_checks.number("mlp_ratio", mlp_ratio),
                    norms=norms,
                    layer_scale_init=scale,
                    drop_path=next(rates),
                    offset_scale=offset_scale,
                    dw_kernel_size=dw_kernel_size,
                    center_feature_scale=center_feature_scale,
                    remove_center=remove_center,
                    backend=backend,
                )
                for _ in range(depth)
            ]
            has_norm = norms != "post" or center_feature_scale
            self.levels.append(Level(blocks, width, has_norm, norms_after if i == 2 else (), following))
        self.add_head(widths)
        self.apply(_initialize)
        for module in self.modules():
            if isinstance(module, DCNv3):
                module.reset_parameters()

    def add_head(self, widths: Sequence[int]) -> None:
        """Create the modules after the stages."""
        self.conv_head: nn.Module = ConvHead(widths[-1], self.num_features)
        self.head = self.classifier()

    def enter(self, index: int, x: Tensor) -> Tensor:
        """Downsample the image by 4 in the stem, and later maps by 2 in the previous level."""
        y: Tensor = self.patch_embed(x) if index == 0 else self.levels[index - 1].downsample(x)  # type: ignore
        return y

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Run the blocks and norms of a level."""
        x = x.permute(0, 2, 3, 1)
        for part in self.levels[index].runs():  # type: ignore[operator]
            x = self.run(part, x)
        return x.permute(0, 3, 1, 2)

    def parts(self, index: int) -> tuple[str, ...]:
        """Return the names of a level and of the downsampling before it."""
        return f"levels.{index}", f"levels.{index - 1}.downsample" if index else "patch_embed"

    def finish(self, x: Tensor) -> Tensor:
        """Widen the last feature."""
        y: Tensor = self.conv_head(x)
        return y

    def unfinish(self) -> None:
        """Remove the modules after the stages."""
        self.conv_head = nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's groups of parameters, by levels or by blocks, for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^levels\.(\d+)"}
        last = len(self.levels) - 1
        blocks = [
            (r"^levels\.(\d+)\.blocks\.(\d+)", None),
            *((rf"^levels\.{i}\.(?:norm|downsample)", (i + 1, 0)) for i in range(last)),  # grouped with the next level
            (r"^levels\.(\d+)\.post_norms", (99999,)),
            (rf"^levels\.{last}\.norm|^conv_head|^dcnv3_head|^clip_projector|^fc_norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": blocks}


class InternImageH(InternImage):
    """InternImage with the head of its largest networks: attention over the maps of the last two stages.

    The last map, upsampled to twice its size, and the one before are added. A query, their mean, attends to all pixels.
    The official code rejects images whose third map has an odd number of rows or columns; here the last row and column
    of the upsampled map are cropped in that case.

    Args:
        in_chans, num_classes, drop_rate, drop_path_rate: as in :class:`InternImage`.
        global_pool: "map", for the attention, or "" for the added maps, which allows no classifier.
        head_width: channels of the added maps.
        heads: of the attention.
        hidden: length of the vector that the classifier reads.
        kwargs: further arguments of :class:`InternImage`, except ``head_factor``.

    Raises:
        TypeError, ValueError: also for a ``head_width`` not divisible by the heads, or a classifier without pooling.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "map",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        *,
        head_width: int = 1024,
        heads: int = 16,
        hidden: int = 768,
        **kwargs: Any,
    ) -> None:
        if "head_factor" in kwargs:
            raise TypeError("this head has no head_factor; its width is head_width.")
        self._head = tuple(
            _checks.integer(name, value)
            for name, value in (("head_width", head_width), ("heads", heads), ("hidden", hidden))
        )
        if head_width % heads:
            raise ValueError(f"head_width must be divisible by heads; got {head_width} and {heads}.")
        _checks.choice("global_pool", global_pool, ("map", ""))
        self._pools = bool(global_pool)
        super().__init__(in_chans, num_classes, "", drop_rate, drop_path_rate, **kwargs)

    def add_head(self, widths: Sequence[int]) -> None:
        """Create the modules after the stages."""
        width, heads, hidden = self._head
        self.num_features, self.head_hidden_size = width, hidden
        self.dcnv3_head_x4: nn.Module = nn.Sequential(nn.Conv2d(widths[-1], 4 * width, 1), nn.PixelShuffle(2))
        self.dcnv3_head_x3: nn.Module = nn.Conv2d(widths[-2], width, 1)
        self.clip_projector: nn.Module = AttentionPool(width, hidden, heads)
        self.fc_norm: nn.Module = layer_norm(hidden)
        self.head = self.classifier()

    def classifier(self) -> nn.Module:
        """Return a new head for ``num_classes``."""
        if self.num_classes and not self._pools:
            raise ValueError(f"global_pool='' leaves no vector for {self.num_classes} classes: use num_classes=0.")
        return nn.Linear(self.head_hidden_size, self.num_classes) if self.num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head with a freshly initialized one; 0 classes: none. ``global_pool``: "map" or ""."""
        if global_pool is not None:
            self._pools = bool(_checks.choice("global_pool", global_pool, ("map", "")))
        super().reset_classifier(num_classes)

    def merge(self, third: Tensor, last: Tensor) -> Tensor:
        """Return the map that is pooled, from the features of the last two stages."""
        large: Tensor = self.dcnv3_head_x4(last)
        small: Tensor = self.dcnv3_head_x3(third)
        return small + large[..., : small.shape[2], : small.shape[3]]

    def pooled(self, x: Tensor) -> Tensor:
        """Return the normalized output of the attention, or the map if nothing is pooled."""
        y: Tensor = self.fc_norm(self.clip_projector(x)) if self._pools else x
        return y

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> the map that is pooled, (N, num_features, H/16, W/16)."""
        return self.merge(*self.forward_intermediates(x, 2, intermediates_only=True))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the features of stages, alone or after the map of :meth:`forward_features`; see the base class."""
        count = len(self.feature_info)
        taken, deepest = feature_take_indices(count, indices)
        upto = deepest + 1 if stop_early or intermediates_only else count
        every = super().forward_intermediates(x, list(range(upto)), output_fmt=output_fmt, intermediates_only=True)
        whole = upto == count and not isinstance(self.dcnv3_head_x4, nn.Identity)
        merged = self.merge(*every[-2:]) if whole and (norm or not intermediates_only) else every[-1]
        features = [merged if norm and index == count - 1 else every[index] for index in taken]
        return features if intermediates_only else (merged, features)

    def unfinish(self) -> None:
        """Remove the modules after the stages."""
        self.dcnv3_head_x4, self.dcnv3_head_x3 = nn.Identity(), nn.Identity()
        self.clip_projector, self.fc_norm = nn.Identity(), nn.Identity()


def _indices(norms_after: Sequence[int], depth: int) -> tuple[int, ...]:
    found = tuple(_checks.integer("every entry of norms_after", i, minimum=0, maximum=depth - 1) for i in norms_after)
    if list(found) != sorted(set(found)):
        raise ValueError(f"norms_after must rise; got {found}.")
    return found


def _drop_path_rates(rate: float, kind: str, count: int) -> Iterator[float]:
    rate = _checks.number("drop_path_rate", rate, maximum=1.0)
    start = 0.0 if _checks.choice("drop_path_type", kind, SCHEDULES) == "linear" else rate
    return iter(torch.linspace(start, rate, count, device="cpu").tolist())


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        initialize_truncated(module)


_SIZES = {"internimage_l": 384, "internimage_xl": 384, "internimage_h": 640, "internimage_g": 512}


def _cfg(size: int = 224, **kwargs: Any) -> dict[str, Any]:
    sides: dict[str, Any] = {"input_size": (3, size, size), "pool_size": (size // 32, size // 32)}
    return cfg("patch_embed.conv1", **sides, crop_pct=1.0 if size > 224 else 0.875, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        **{name: _cfg(_SIZES.get(name, 224)) for name in STATED},
        **{f"{name}.in22k": _cfg(384, num_classes=21841) for name in _SIZES},
        "internimage_h.in22k_ft_in1k_384": _cfg(384),
    }
)


def _network(variant: str, pretrained: bool, width: int, kwargs: dict[str, Any], **model_args: Any) -> Any:
    """Build a network whose widths double from ``width``, with the norms of S to XL."""
    widths = tuple(width << i for i in range(4))
    given = {"widths": widths, "groups": tuple(w // 16 for w in widths), "norms": "post", "layer_scale_init": 1e-5}
    return build(InternImage, variant, pretrained, **{**given, **model_args, **kwargs})


@register_model
def internimage_t(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-T."""
    return build(InternImage, "internimage_t", pretrained, **kwargs)  # type: ignore[no-any-return]


@register_model
def internimage_s(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-S."""
    return _network("internimage_s", pretrained, 80, kwargs, depths=(4, 4, 21, 4))  # type: ignore[no-any-return]


@register_model
def internimage_b(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-B."""
    return _network("internimage_b", pretrained, 112, kwargs, depths=(4, 4, 21, 4))  # type: ignore[no-any-return]


@register_model
def internimage_l(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-L."""
    model_args = {"depths": (5, 5, 22, 5), "offset_scale": 2.0}
    return _network("internimage_l", pretrained, 160, kwargs, **model_args)  # type: ignore[no-any-return]


@register_model
def internimage_xl(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-XL."""
    model_args = {"depths": (5, 5, 24, 5), "offset_scale": 2.0}
    return _network("internimage_xl", pretrained, 192, kwargs, **model_args)  # type: ignore[no-any-return]


def _largest(variant: str, pretrained: bool, width: int, kwargs: dict[str, Any], **model_args: Any) -> Any:
    """Build a network like H and G: their head, 32 channels per group, and a norm after every sixth block."""
    widths = tuple(width << i for i in range(4))
    given = {**model_args, **kwargs}
    given = {
        "widths": widths,
        "groups": tuple(w // 32 for w in widths),
        "norms_after": tuple(range(5, given["depths"][2], 6)),
        "dw_kernel_size": 5,
        "center_feature_scale": True,
        **given,
    }
    return build(InternImageH, variant, pretrained, **given)


@register_model
def internimage_h(pretrained: bool = False, **kwargs: Any) -> InternImageH:
    """InternImage-H."""
    model_args = {"depths": (6, 6, 32, 6), "norms": "both"}
    return _largest("internimage_h", pretrained, 320, kwargs, **model_args)  # type: ignore[no-any-return]


@register_model
def internimage_g(pretrained: bool = False, **kwargs: Any) -> InternImageH:
    """InternImage-G with 3 billion parameters, from the official repository; not in the paper."""
    model_args = {"depths": (2, 2, 48, 4), "norms": "post"}
    return _largest("internimage_g", pretrained, 512, kwargs, **model_args)  # type: ignore[no-any-return]
