"""Define the conversions, frozen configs that determine the replacement of a convolution: :class:`Conversion`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar, NamedTuple, Self

import torch
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from widefield import _checks
from widefield.nn import (
    DecomposedConv2d,
    DeformConv2d,
    DepthwiseConv2d,
    DepthwiseConv2dSame,
    DilatedReparamConv2d,
    DynamicGMConv2d,
    FusedMoRFConv2d,
    GMConv2d,
    InceptionDWConv2d,
    LargeKernelConv2d,
    MoRFConv2d,
    ReparamConv2d,
    SameAligned,
    deform,
    depthwise,
    gmconv,
    inception,
    lka,
    mixers,
    morf,
    reparam,
)
from widefield.nn.same import centered, is_same

_STANDARDIZED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


class Place(NamedTuple):
    """The place of a convolution in a model."""

    name: str
    reads_image: bool
    stage: int
    """Index from 0 over the stages that hold convolutions to replace."""
    stages: int
    """Number of these stages."""


class Conversion(ABC):
    """Base class of the configs that :func:`plan` and :func:`convert` take."""

    layers: ClassVar[tuple[type[nn.Module], ...]] = ()
    """The layers that it creates."""
    keeps_parameters: ClassVar[bool] = False
    """Whether the new layer is a Conv2d with the same parameters, so that sharing and merging them still works."""
    takes_stem: ClassVar[bool] = False
    """Whether the stem is converted, too, if ``where`` is not given."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse unknown options, naming the right one."""
        _checks.known_arguments(cls.__name__, options, [field.name for field in fields(cls)])  # type: ignore[arg-type]
        return super().__new__(cls)

    def at(self, place: Place) -> Conversion:
        """Return the config for one place; raises ValueError if the config does not fit the model."""
        return self

    def why_not(self, module: nn.Module) -> str | None:
        """Return why a convolution cannot be replaced, or None if it can."""
        if isinstance(module, _STANDARDIZED):
            return f"it is a {type(module).__name__}, which standardizes its kernel in every call"
        if not is_same(module):
            return self._why_not(module)
        conv = centered(module)
        return conv if isinstance(conv, str) else self._why_not(conv)

    def replacement(self, module: nn.Module) -> nn.Module:
        """Return the new layer for a convolution, which is not changed.

        For a ``timm.layers.Conv2dSame`` with a stride this is a :class:`widefield.nn.SameAligned`.
        """
        if not isinstance(module, nn.Conv2d):
            raise TypeError(f"{type(self).__name__} replaces torch.nn.Conv2d; got {type(module).__name__}.")
        if not is_same(module):
            return self._replace(module)
        conv = centered(module)
        if isinstance(conv, str):
            raise ValueError(f"{module} cannot be replaced: {conv}.")
        layer = self._replace(conv)
        return layer if set(conv.stride) == {1} else SameAligned(layer, _checks.pair("stride", conv.stride))

    @abstractmethod
    def _why_not(self, module: nn.Module) -> str | None:
        """Return why a convolution with fixed padding cannot be replaced, or None."""

    @abstractmethod
    def _replace(self, conv: nn.Conv2d) -> nn.Module:
        """Return the new layer for a convolution with fixed padding."""

    def options(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def _with(self, **changes: Any) -> Self:
        return type(self)(**{**self.options(), **changes})


@dataclass(frozen=True)
class MoRF(Conversion):
    """Replace convolutions with mixtures of receptive fields, :class:`widefield.nn.MoRFConv2d` (Lian, Yu, Wang 2024).

    The fields are the arguments of the layer. ``init="preserve"`` keeps the model's function in evaluation mode, up to
    rounding (:meth:`widefield.nn.MoRFConv2d.absorb`); ``"random"`` initializes the layers anew.

    Raises:
        TypeError, ValueError: an argument that the layer refuses.
    """

    layers = (MoRFConv2d, FusedMoRFConv2d)
    kernel_sizes: tuple[int | tuple[int, int], ...] = (3, 5, 7, 9, 11)
    routing: str = "soft"
    attention: str = "none"
    top_k: int = 2
    router_width: int | None = None
    init: str = "preserve"
    backend: str = "auto"

    def __post_init__(self) -> None:
        MoRFConv2d.from_conv2d(nn.Conv2d(1, 1, 1, device="meta"), **{**self.options(), "init": "random"})
        _checks.init(self.init)
        sizes = tuple(size if isinstance(size, int) else tuple(size) for size in self.kernel_sizes)
        object.__setattr__(self, "kernel_sizes", sizes)  # lists, from YAML say, would not hash

    def _why_not(self, module: nn.Module) -> str | None:
        reason = morf.why_not(module)
        if reason is None and self.init == "preserve" and isinstance(module, nn.Conv2d):
            return morf.lacks_room(module, self.kernel_sizes)
        return reason

    def _replace(self, conv: nn.Conv2d) -> nn.Module:
        return MoRFConv2d.from_conv2d(conv, **self.options())


@dataclass(frozen=True)
class FastDepthwise(Conversion):
    """Replace depthwise convolutions with :class:`widefield.nn.DepthwiseConv2d`: same weights, keys and function.

    An existing model gets the fast forward and gradients of :func:`widefield.ops.depthwise_conv2d`. ``reparameterize``
    restores the plain convolutions.

    Raises:
        ValueError: an unknown backend.
    """

    layers = (DepthwiseConv2d,)
    keeps_parameters = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        DepthwiseConv2d(1, 1, 1, backend=self.backend, device="meta")

    def replacement(self, module: nn.Module) -> nn.Module:
        """Return the new layer, with the parameters, keys and padding of the convolution."""
        if isinstance(module, Conv2dSame) and is_same(module):
            return DepthwiseConv2dSame.from_conv2d(module, backend=self.backend)
        return super().replacement(module)

    def why_not(self, module: nn.Module) -> str | None:
        """Return why a convolution cannot be replaced, or None if it can."""
        if isinstance(module, Conv2dSame) and is_same(module):
            return depthwise.not_depthwise(module)
        return super().why_not(module)

    def _why_not(self, module: nn.Module) -> str | None:
        return depthwise.why_not(module)

    def _replace(self, conv: nn.Conv2d) -> nn.Module:
        return DepthwiseConv2d.from_conv2d(conv, backend=self.backend)


@dataclass(frozen=True)
class GMConv(Conversion):
    """Put learned Gaussian masks on convolutions, which limit how far a kernel reaches (Chen et al., GMConv, sec. III).

    As in the paper, convolutions that read the image get masks that depend on it
    (:class:`widefield.nn.DynamicGMConv2d`). All others get one learned sigma (:class:`widefield.nn.GMConv2d`), which
    ``reparameterize`` folds into the kernel.

    Args:
        stem: mask of convolutions that read the image: "dynamic", "static", or "none" to leave them.
        body: mask of all other convolutions.
        sigma: initial value; None: 5, and more for kernels larger than 11x11.
        predict, reduction: arguments of the dynamic layers.
        init: "preserve" divides the weights by the mask, so that the model keeps its function; "random" does not.

    Raises:
        TypeError, ValueError: an unknown option or a number out of range.
    """

    layers = (GMConv2d, DynamicGMConv2d)
    takes_stem = True
    stem: str = "dynamic"
    body: str = "static"
    sigma: float | None = None
    predict: str = "sigma1_ratio"
    reduction: float = 4 / 3
    init: str = "preserve"

    def __post_init__(self) -> None:
        for name in ("stem", "body"):
            _checks.choice(name, getattr(self, name), ("static", "dynamic", "none"))
        conv = nn.Conv2d(1, 1, 3, device="meta")
        for kind in ("static", "dynamic"):
            self._layer(conv, kind, _checks.init(self.init) and "random")

    def at(self, place: Place) -> Conversion:
        """Return a config with the mask for this place only."""
        kind = self.stem if place.reads_image else self.body
        return self._with(stem=kind, body=kind)

    def _why_not(self, module: nn.Module) -> str | None:
        if self.stem == self.body == "none":
            return "the config has 'none' for it"
        reason = gmconv.why_not(module)
        if reason is None and self.init == "preserve" and isinstance(module, nn.Conv2d):
            return gmconv.fades_out(module, self.sigma)
        return reason

    def _replace(self, conv: nn.Conv2d) -> nn.Module:
        return self._layer(conv, self.body, self.init)

    def _layer(self, conv: nn.Conv2d, kind: str, init: str) -> nn.Module:
        if kind == "static":
            return GMConv2d.from_conv2d(conv, init=init, sigma=self.sigma)
        return DynamicGMConv2d.from_conv2d(
            conv, init=init, sigma=self.sigma, predict=self.predict, reduction=self.reduction
        )


_LARGE: dict[str, type[ReparamConv2d]] = {
    "small": LargeKernelConv2d,
    "dilated": DilatedReparamConv2d,
    "bands": DecomposedConv2d,
}


@dataclass(frozen=True)
class LargeKernel(Conversion):
    """Enlarge depthwise convolutions as RepLKNet, UniRepLKNet or SLaK do (:mod:`widefield.nn.large_kernel`).

    ``LargeKernel((31, 29, 27, 13))`` enlarges the depthwise convolutions in the four stages of a ConvNeXt to these
    sizes. ``reparameterize`` merges the branches.

    Args:
        kernel_sizes: one size for all, or one for each stage that holds depthwise convolutions. Within the latter,
            (rows, columns) is a rectangular kernel.
        small: size of the small kernel next to the large one; None: no small kernel.
        branches: "small": a large kernel and a small one (:class:`widefield.nn.LargeKernelConv2d`); "dilated": a large
            kernel and UniRepLKNet's dilated ones (:class:`widefield.nn.DilatedReparamConv2d`); "bands": two crossed
            bands, ``small`` taps wide, and a square (:class:`widefield.nn.DecomposedConv2d`).
        norm: batch norm after each branch, as in the papers. A pretrained function is then kept in evaluation mode
            only. ``norm=False`` keeps it in training mode, too, and requires ``branches="small"``.
        init: "preserve" keeps the model's function; bands can do so only for kernels no wider than ``small``.
            "random" initializes the layers anew.

    Raises:
        TypeError, ValueError: an argument that the layer refuses.
    """

    layers = tuple(_LARGE.values())
    kernel_sizes: int | tuple[int | tuple[int, int], ...]
    small: int | None = 5
    branches: str = "small"
    norm: bool = True
    init: str = "preserve"

    def __post_init__(self) -> None:
        _checks.init(self.init)
        _checks.choice("branches", self.branches, tuple(_LARGE))
        if not self.norm and self.branches != "small":
            raise ValueError(f"norm=False is for branches='small'; got branches={self.branches!r}.")
        if not isinstance(self.kernel_sizes, int):
            sizes = tuple(size if isinstance(size, int) else tuple(size) for size in self.kernel_sizes)
            if not sizes:
                raise ValueError("kernel_sizes is empty: pass one size, or one for each stage.")
            object.__setattr__(self, "kernel_sizes", sizes)
        for size in self._sizes():
            make: Any = _LARGE[self.branches]
            make(1, 1, size, **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        options = {"small": {"small": self.small, "norm": self.norm}, "dilated": {}, "bands": {"small": self.small}}
        return options[self.branches]

    def _sizes(self) -> Sequence[int | tuple[int, int]]:
        return (self.kernel_sizes,) if isinstance(self.kernel_sizes, int) else self.kernel_sizes

    def at(self, place: Place) -> Conversion:
        """Return the config with the size for this stage."""
        sizes = self._sizes()
        if len(sizes) == 1:
            return self
        if len(sizes) != place.stages:
            raise ValueError(
                f"kernel_sizes={self.kernel_sizes} has {len(sizes)} sizes, but the model's depthwise convolutions are "
                f"in {place.stages} stages: pass one size for each stage, or one for all."
            )
        return self._with(kernel_sizes=(sizes[place.stage],))

    def _why_not(self, module: nn.Module) -> str | None:
        reason = reparam.why_not(module)
        if reason is None and self.init == "preserve" and len(self._sizes()) == 1 and isinstance(module, nn.Conv2d):
            size = _checks.pair("kernel_size", self._sizes()[0])
            return reparam.lacks_room(module, (size[0], self.small or 1) if self.branches == "bands" else size)
        return reason

    def _replace(self, conv: nn.Conv2d) -> nn.Module:
        kind = _LARGE[self.branches]
        return kind.from_conv2d(conv, self._sizes()[0], init=self.init, **self._arguments())


@dataclass(frozen=True)
class InceptionSplit(Conversion):
    """Split depthwise convolutions into a square, two bands and an identity (Yu et al., InceptionNeXt, eq. 3).

    This does not preserve the model's function: most kernels are dropped
    (:meth:`widefield.nn.InceptionDWConv2d.from_conv2d`). Train the model afterward.

    Raises:
        TypeError, ValueError: an argument that the layer refuses.
    """

    layers = (InceptionDWConv2d,)
    square_kernel_size: int = 3
    band_kernel_size: int | None = 11
    branch_ratio: float = 0.125

    def __post_init__(self) -> None:
        InceptionDWConv2d(64, self.square_kernel_size, self.band_kernel_size or 11, self.branch_ratio)

    def _why_not(self, module: nn.Module) -> str | None:
        reason = inception.why_not(module)
        if reason is None and isinstance(module, nn.Conv2d):
            return inception.lacks_room(module.in_channels, self.branch_ratio)
        return reason

    def _replace(self, conv: nn.Conv2d) -> nn.Module:
        return InceptionDWConv2d.from_conv2d(conv, **self.options())


@dataclass(frozen=True)
class Deformable(Conversion):
    """Replace convolutions with deformable ones, :class:`widefield.nn.DeformConv2d` (Wang et al., InternImage, eq. 2).

    The layers are initialized anew, because they cannot express a given kernel.

    Args:
        groups: number of point sets in each layer; by default one for every 16 channels.
        offset_scale, center_feature_scale: arguments of the layer.

    Raises:
        TypeError, ValueError: an argument that the layer refuses.
    """

    layers = (DeformConv2d,)
    groups: int | None = None
    offset_scale: float = 1.0
    center_feature_scale: bool = False

    def __post_init__(self) -> None:
        DeformConv2d(self.groups or 1, self.groups or 1, 3, **self.options())

    def _why_not(self, module: nn.Module) -> str | None:
        reason = deform.why_not(module)
        if reason is None and self.groups and isinstance(module, nn.Conv2d) and module.in_channels % self.groups:
            return f"groups={self.groups} does not divide its {module.in_channels} input channels"
        return reason

    def _replace(self, conv: nn.Conv2d) -> nn.Module:
        return DeformConv2d.from_conv2d(conv, **self.options())


@dataclass(frozen=True)
class TokenMixer(Conversion):
    """Replace depthwise convolutions with other token mixers, which are initialized anew.

    A new mixer has the scale of the convolution that it replaces: on noise both outputs have the same root mean square,
    except for "pooling", which has no parameters. Mixers with gates read their input at unit scale
    (:class:`widefield.nn.mixers.Rescaled`).

    Args:
        mixer: a name in :data:`widefield.nn.mixers.TOKEN_MIXERS`, such as "lka", "gnconv", "moga", "focal" or
            "attention".
        stage: stage index, for mixers that differ by stage. Conversion sets it for each convolution.

    Raises:
        ValueError: an unknown name.
    """

    mixer: str
    stage: int = 0

    def __post_init__(self) -> None:
        _checks.choice("mixer", self.mixer, tuple(mixers.TOKEN_MIXERS))

    def at(self, place: Place) -> Conversion:
        """Return the config for this stage."""
        return self._with(stage=place.stage)

    def _why_not(self, module: nn.Module) -> str | None:
        reason = lka.why_not(module)
        if reason is None and isinstance(module, nn.Conv2d):
            try:
                with torch.device("meta"):
                    mixers.TOKEN_MIXERS[self.mixer](module.in_channels, self.stage)
            except (TypeError, ValueError) as error:
                return f"{self.mixer} does not support its {module.in_channels} channels: {str(error).rstrip('.')}"
        return reason

    def _replace(self, conv: nn.Conv2d) -> nn.Module:
        return mixers.in_place_of(conv, self.mixer, self.stage)


def checked(config: object, verb: str) -> Conversion:
    """Return ``config`` if it is a conversion; raises TypeError with the call that was probably meant.

    Args:
        config: the argument of :func:`plan` or :func:`convert`.
        verb: the name of that function.
    """
    if isinstance(config, Conversion):
        return config
    kinds = {kind.__name__: kind for kind in Conversion.__subclasses__()}
    made = config if isinstance(config, type) else type(config)
    if isinstance(config, str):
        flat = {name.lower(): name for name in kinds}
        near = get_close_matches(config.lower().replace("_", ""), flat, n=1)
        meant = kinds[flat[near[0]]] if near else None
    elif issubclass(made, Conversion):
        meant = made
    else:
        meant = next((kind for kind in kinds.values() if issubclass(made, kind.layers)), None)
    got = repr(config) if isinstance(config, str) else f"an object of type {made.__name__}"
    got = f"the class {config.__name__}" if isinstance(config, type) else got
    calls = [_call(kind) for kind in ([meant] if meant else kinds.values())]
    raise TypeError(f"config must be a conversion; got {got}. Call {verb}(model, {' or '.join(calls)}).")


def _call(kind: type[Conversion]) -> str:
    needed = [f"{f.name}=..." for f in fields(kind) if f.default is MISSING and f.init]  # type: ignore[arg-type]
    return f"{kind.__name__}({', '.join(needed)})"
