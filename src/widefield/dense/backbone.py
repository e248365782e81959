"""Turn any network into a backbone for dense prediction: feature maps at several strides, finest first."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from timm.models._features import FeatureGetterNet, FeatureHookNet, FeatureHooks, FeatureInfo
from torch import Tensor, nn

from widefield import _checks, _history, _timm
from widefield.dense._published import follow_published_code
from widefield.surgery import anatomy
from widefield.surgery.answers import described, evaluating
from widefield.surgery.walk import duplicate

Backboned = str | nn.Module
"""A timm name, or a module that :func:`feature_maps` accepts."""

StageNorms = str | Callable[[int], nn.Module] | None
"""A name of :data:`NORMS`, "none", or a callable from channels to a module. None follows the backbone's family."""

NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "layer": partial(LayerNorm2d, eps=1e-6),
    "batch": nn.BatchNorm2d,
}
"""Name -> callable of the channels: LayerNorm over channels, batch norm."""

_FAMILIES: tuple[tuple[str, frozenset[str], Callable[[int], nn.Module]], ...] = (
    (r"(^|_)convnext", frozenset({"ConvNeXt", "ConvNeXtStage"}), NORMS["layer"]),
    (r"^hornet", frozenset({"HorNet"}), NORMS["layer"]),
    (r"^unireplknet", frozenset({"UniRepLKNet"}), NORMS["layer"]),
    (r"^focalnet", frozenset({"FocalNet", "FocalNetStage"}), partial(LayerNorm2d, eps=1e-5)),
    (r"^replknet_xl", frozenset(), NORMS["batch"]),
)
"""(names in timm, names of classes, norm) of each family whose published segmentation code normalizes the maps."""

_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")
"""Prefixes of timm's names for models outside of its registry."""

_ARGUMENTS = (
    "channels", "auxiliary", "auxiliary_channels", "neck_channels", "stage_norms", "dropout", "align_corners",
    "pool_scales", "dilations", "out_indices", "output_stride", "pretrained", "drop_path_rate", "in_chans",
    "anchor_scales", "box_head", "box_loss", "box_channels", "class_agnostic", "masks", "frozen_stages", "norm_eval",
    "score_threshold", "nms_threshold", "max_per_image",
)  # fmt: skip
"""Usual arguments of segmenters, detectors and backbones, for hints."""

_SIDES = (128, 224)
"""Sides of the images on which unknown networks are measured; the second for networks that refuse the first."""


class FeatureMaps(nn.Module):
    """Feature maps of a network, finest first, each perhaps followed by a norm.

    Built by :func:`feature_maps`. The network is ``body``; the norms are ``norm0``, ``norm1`` and so on, numbered like
    their maps.

    Attributes:
        channels: channels of each map.
        strides: side of the image over the side of each map.

    Args:
        body: returns a tensor, or a sequence or mapping of maps.
        channels, strides: see above.
        taken: positions of the maps in the output of ``body``.
        hooks: modules of ``body`` whose outputs are the maps, if ``body`` does not return them.
        norms: callable of the channels for each map; None for no norm.
        numbers: positions of the maps among all maps of the network; published norms are numbered by them. None: the
            maps are the first ones.
    """

    def __init__(
        self,
        body: nn.Module,
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        taken: Sequence[int],
        hooks: Sequence[str] = (),
        norms: Sequence[Callable[[int], nn.Module] | None] = (),
        numbers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.channels = tuple(channels)
        self.strides = tuple(strides)
        self.taken = tuple(taken)
        self.numbers = tuple(range(len(channels)) if numbers is None else numbers)
        self._hooks = FeatureHooks(hooks, body.named_modules()) if hooks else None
        self._channels_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")
        like = next(body.parameters(), torch.empty(0))
        for index, norm in enumerate(norms):
            if norm is not None:
                self.add_module(f"norm{index}", norm(self.channels[index]).to(like))

    @property
    def has_hooks(self) -> bool:
        """Whether the maps come from hooks on modules inside ``body``, which have to be called for that."""
        return self._hooks is not None or isinstance(self.body, FeatureHookNet)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, C, H, W) -> maps, each (N, channels[i], H / strides[i], W / strides[i]) up to rounding."""
        output = self.body(images)
        found = _listed(output if self._hooks is None else self._hooks.get_output(images.device))
        maps = []
        for position, index in enumerate(self.taken):
            x = found[index].permute(0, 3, 1, 2) if self._channels_last else found[index]
            norm = self._modules.get(f"norm{position}")
            maps.append(x if norm is None else norm(x))
        return maps


def feature_maps(
    backbone: Backboned | FeatureMaps,
    *,
    levels: int = 4,
    out_indices: Sequence[int] | None = None,
    stage_norms: StageNorms = None,
    normed: Sequence[int] | None = None,
    **backbone_args: Any,
) -> FeatureMaps:
    """Return the feature maps of a network as a module, without the parts that they do not need.

    Where the published segmentation code of a family differs from timm's network, the network is set up like it, in
    place: the eps of VAN's norms, the padding of FocalNet's maps, and the dilations of MobileNetV2. Weights stay.

    Parameters that do not influence the maps are removed or, if that is not possible, frozen, so that distributed
    training does not wait for their gradients. A network that is not timm's runs once, on a small black image, to
    measure its maps.

    Args:
        backbone: one of these:

            - a timm name, built with ``features_only=True``;
            - a timm network that was built so;
            - a whole classifier. It is copied, and the copy loses the layers after the last map. Its stages must be
              known to timm or to :func:`widefield.surgery.anatomy`;
            - any other module that returns a list, tuple or dictionary of maps, finest first, such as an encoder of
              segmentation-models-pytorch. The image itself and maps without channels do not count;
            - the result of an earlier call, which is returned as it is. Its maps and norms cannot be chosen anew.
        levels: how many maps. The last ones are used.
        out_indices: the maps to use, by position; instead of ``levels``.
        stage_norms: norms after the maps: "layer" (LayerNorm over channels, eps 1e-6), "batch", "none", or a callable
            from channels to a module. None follows the published segmentation code of the family: layer norms for
            ConvNeXt, HorNet, UniRepLKNet and FocalNet, batch norms for RepLKNet-XL, none for others.
        normed: positions of the maps that get norms; None for all. Norms of unused maps would have no gradient.
        backbone_args: further arguments of ``timm.create_model``, such as ``pretrained=True`` or ``output_stride=16``.

    Raises:
        TypeError: an argument is unknown, or ``backbone_args`` are given with a module.
        ValueError: the name is unknown, the network gives no or too few maps, or the arguments choose other maps or
            norms than the result of an earlier call has.
    """
    options = {
        "levels": levels, "out_indices": out_indices, "stage_norms": stage_norms, "normed": normed, **backbone_args,
    }  # fmt: skip
    if isinstance(backbone, str):
        indices = range(-levels, 0) if out_indices is None else out_indices
        network = _created(backbone, tuple(indices), backbone_args)
        found = _described(network, range(len(network.feature_info.out_indices)))
    else:
        _refuse(backbone, backbone_args)
        if isinstance(backbone, FeatureMaps):
            _refuse_choices(backbone, normed, out_indices=out_indices, stage_norms=stage_norms)
            return backbone
        found = _found(backbone, levels, out_indices)
    follow_published_code(found.body)
    norm = _norm(stage_norms, found.body)
    positions = range(len(found.channels)) if normed is None else normed
    norms = [norm if index in positions else None for index in range(len(found.channels))]
    maps = FeatureMaps(
        found.body,
        found.channels,
        found.strides,
        taken=found.taken,
        hooks=found.hooks,
        norms=norms,
        numbers=found.numbers,
    )
    return _history.made(maps, "feature_maps", __name__, {"backbone": backbone, **options})


@dataclass(frozen=True)
class _Found:
    """A network and its maps; see :class:`FeatureMaps`."""

    body: nn.Module
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    taken: tuple[int, ...]
    numbers: tuple[int, ...]
    hooks: tuple[str, ...] = ()


# Networks by name


def _created(name: str, indices: tuple[int, ...], args: Mapping[str, Any]) -> Any:
    """Return timm's network of this name, built to return these maps."""
    if not name.startswith(_SOURCES) and not timm.is_model(name):
        raise ValueError(f"timm has no network {name!r}.{_checks.did_you_mean(name, timm.list_models(), likeness=0.6)}")
    try:
        return _timm.create_model(name, {"features_only": True, "out_indices": indices, **args})
    except (TypeError, AssertionError, IndexError, RuntimeError) as error:
        refusal = _refusal(name, indices, args, error)
        if refusal is None:
            raise
        raise refusal from error


def _refusal(name: str, indices: tuple[int, ...], args: Mapping[str, Any], error: Exception) -> Exception | None:
    """Return the error for what timm or the network refused; None if timm's says it."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown is not None and unknown[1] == "output_stride" in args:
        return ValueError(
            f"{name} has no output_stride, so its coarsest map keeps its stride: pass output_stride=32, or choose "
            "another network."
        )
    if unknown is not None and unknown[1] in args:
        return TypeError(
            f"neither the model nor {name} has an argument {unknown[1]!r}."
            f"{_checks.did_you_mean(unknown[1], [word for word in _ARGUMENTS if word not in args])}"
        )
    empty = [key for key, value in args.items() if value is None]
    if empty:
        return ValueError(f"{name} cannot be built with {', '.join(empty)} None: leave out what it cannot do without.")
    if isinstance(error, (AssertionError, IndexError)):
        return ValueError(
            f"{name} has no feature maps at the positions {indices}: it has fewer. Choose others with out_indices, "
            "such as out_indices=(0, 1, 2)."
        )
    if isinstance(error, RuntimeError) and "features_only" in str(error):
        return ValueError(f"{name} gives no feature maps: timm builds it as a classifier only.")
    return None


# Networks as modules


def _refuse(backbone: object, args: Mapping[str, Any]) -> None:
    """Refuse backbones that are not modules, and arguments for a network that exists already."""
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone must be a timm name or a module; got {backbone!r} of {type(backbone).__name__}.")
    for name in args:
        raise TypeError(
            f"there is no argument {name!r} for a backbone that is a module."
            f"{_checks.did_you_mean(name, [word for word in _ARGUMENTS if word not in args])} Arguments of the network "
            "belong to its own constructor."
        )


def _refuse_choices(maps: FeatureMaps, normed: Sequence[int] | None, **choices: object) -> None:
    """Refuse to choose the maps and norms of feature maps that exist already."""
    for name, value in choices.items():
        if value is not None:
            raise ValueError(
                f"{name} has no effect on the result of feature_maps, whose maps and norms are chosen; got {value!r}. "
                f"Give {name} to that call instead, or pass the network itself."
            )
    found = {index for index in range(len(maps.channels)) if f"norm{index}" in maps._modules}
    if normed is not None and not found <= set(normed):
        raise ValueError(
            f"the backbone has norms after the maps {sorted(found)}, and only those after {sorted(set(normed))} are "
            f"used, so the others would have no gradient. Give normed={tuple(normed)} to feature_maps, or pass the "
            "network itself."
        )


def _found(network: Any, levels: int, out_indices: Sequence[int] | None) -> _Found:
    """Return the maps of a module."""
    info = getattr(network, "feature_info", None)
    if isinstance(info, FeatureInfo):
        return _described(network, _chosen(network, range(len(info.out_indices)), levels, out_indices))
    if info and callable(getattr(network, "forward_intermediates", None)):
        taken = _chosen(network, range(len(info)), levels, out_indices)
        getter = FeatureGetterNet(duplicate(network), out_indices=taken)
        return _described(getter, range(len(taken)))
    images, output = _run(network)
    if not isinstance(output, Tensor):
        return _measured(network, images, _listed(output), levels, out_indices)
    stages = tuple(stage.name for stage in anatomy(network).stages)
    if not stages:
        raise ValueError(
            f"{type(network).__name__} returns one tensor {described(output)}, and its stages are unknown. Give a "
            "module that returns a list of maps, such as timm.create_model(name, features_only=True) or the result of "
            "torchvision.models.feature_extraction.create_feature_extractor."
        )
    network = duplicate(network)
    for head in anatomy(network).heads:
        network.set_submodule(head, nn.Identity())
    images, output = _run(network, stages)
    return replace(_measured(network, images, output, levels, out_indices), hooks=stages)


def _chosen(
    network: nn.Module, usable: Sequence[int], levels: int, out_indices: Sequence[int] | None
) -> tuple[int, ...]:
    """Return the positions of the maps to use, from 0 on."""
    wanted = range(-levels, 0) if out_indices is None else out_indices
    for index in wanted:
        if not -len(usable) <= index < len(usable):
            asked = f"{levels} are needed" if out_indices is None else f"out_indices asks for {index}"
            raise ValueError(f"{type(network).__name__} gives {len(usable)} feature maps, and {asked}.")
    return tuple(usable[index] for index in wanted)


def _described(network: Any, taken: Sequence[int]) -> _Found:
    """Return the maps of a network that describes them as timm does."""
    channels, strides = network.feature_info.channels(), network.feature_info.reduction()
    if isinstance(network, FeatureHookNet):  # holds the layers after the last map too
        _freeze_unused(network, [_run(network)[1][index] for index in taken])
    info = network.feature_info
    numbers = tuple(info.out_indices[i] % len(info.info) for i in taken)
    return _Found(network, tuple(channels[i] for i in taken), tuple(strides[i] for i in taken), tuple(taken), numbers)


def _measured(
    network: nn.Module, images: Tensor, output: Sequence[Any], levels: int, out_indices: Sequence[int] | None
) -> _Found:
    """Return the maps of a network that gave this output for these images."""
    maps = [x for x in output if isinstance(x, Tensor) and x.ndim == 4]
    if len(maps) < len(output):
        raise ValueError(
            f"{type(network).__name__} must return feature maps (N, C, H, W) only; it returns {described(output)}."
        )
    usable = [index for index, x in enumerate(maps) if x.shape[1] and x is not images]
    taken = _chosen(network, usable, levels, out_indices)
    strides = tuple(round(images.shape[2] / maps[index].shape[2]) for index in taken)
    if list(strides) != sorted(strides):
        raise ValueError(
            f"{type(network).__name__} must return its finest map first; its maps have strides {strides}. Choose an "
            "order with out_indices."
        )
    _freeze_unused(network, [maps[index] for index in taken])
    numbers = tuple(usable.index(index) for index in taken)
    return _Found(network, tuple(maps[index].shape[1] for index in taken), strides, taken, numbers)


def _run(network: nn.Module, stages: Sequence[str] = ()) -> tuple[Tensor, Any]:
    """Return black images and the output in evaluation mode; with ``stages``, the outputs of these modules."""
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    readers = anatomy(network).readers
    channels = getattr(network.get_submodule(readers[0]), "in_channels", 3) if readers else 3
    seen: list[Any] = []
    hooks = [network.get_submodule(name).register_forward_hook(lambda _m, _x, y: seen.append(y)) for name in stages]
    error: Exception | None = None
    try:
        with evaluating(network), torch.enable_grad():
            for side in _SIDES:
                images = torch.zeros(1, channels, side, side, dtype=like.dtype, device=like.device)
                try:
                    output = network(images)
                    return images, seen if stages else output
                except (RuntimeError, ValueError, AssertionError) as raised:
                    error = error or raised
                    seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    raise ValueError(
        f"{type(network).__name__} refuses images of {channels}x{_SIDES[0]}x{_SIDES[0]}, so its feature maps cannot be "
        f"measured: {str(error).splitlines()[0]}"
    ) from error


def _freeze_unused(network: nn.Module, maps: Sequence[Tensor]) -> None:
    """Freeze the parameters that do not influence the maps."""
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    reached = [x.sum() for x in maps if x.requires_grad]
    if not learned or not reached:
        return
    grads: Sequence[Tensor | None] = torch.autograd.grad(reached, learned, allow_unused=True)
    for parameter, grad in zip(learned, grads, strict=True):
        if grad is None:
            parameter.requires_grad_(False)


def _listed(output: Any) -> list[Any]:
    return list(output.values() if isinstance(output, Mapping) else output)


# Norms


def _norm(chosen: StageNorms, network: nn.Module) -> Callable[[int], nn.Module] | None:
    """Return what builds the norms from channels, or None."""
    if chosen is None:
        return _family_norm(network)
    if callable(chosen):
        return chosen
    return NORMS.get(_checks.choice("stage_norms", chosen, (*NORMS, "none")))


def _family_norm(network: nn.Module) -> Callable[[int], nn.Module] | None:
    """Return the norm of the published segmentation code of the network's family."""
    configs = [getattr(module, "pretrained_cfg", None) or {} for module in network.modules()]
    names = {str(config.get("architecture")) for config in configs if isinstance(config, Mapping)}
    classes = {base.__name__ for module in network.modules() for base in type(module).__mro__}
    for pattern, kinds, norm in _FAMILIES:
        if any(re.search(pattern, name) for name in names) or classes & kinds:
            return norm
    return None
