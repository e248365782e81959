"""Run a model in an analysis, and restore its modes, gradients and hooks, also after an exception."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.analysis._maps import as_map, inner_map, map_hint
from widefield.surgery.anatomy import anatomy, is_inside
from widefield.surgery.inputs import pixels, place

__all__ = [
    "Layer",
    "as_map",
    "batched",
    "chunks",
    "inner_map",
    "is_size",
    "last_maps",
    "layer_name",
    "made_up",
    "map_hint",
    "never_called",
    "running",
    "submodule",
    "track",
    "turned",
    "visited",
    "watched",
]

T = TypeVar("T")

Layer = str | nn.Module
"""A layer of a model: its name, or the module."""

_FRAMES = 16
"""Frames of the clips made by :func:`made_up`."""


@contextmanager
def visited(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into evaluation mode without parameter gradients, and restore both at the end.

    Gradients with respect to the images still flow. ``.grad`` of the parameters is neither read nor written.
    """
    modes = {module: module.training for module in model.modules()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        yield model
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training


@contextmanager
def watched(
    modules: Mapping[str, nn.Module], see: Callable[[str, nn.Module, tuple[Any, ...], Any], None]
) -> Iterator[None]:
    """Call ``see(name, module, inputs, output)`` after each forward pass of these modules.

    The hooks are removed at the end.
    """
    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(lambda m, args, output, name=name: see(name, m, args, output)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def chunks(
    images: Tensor | Iterable[Any], model: nn.Module, size: int | None = None, *, clips: bool = False
) -> Iterator[Tensor]:
    """Yield images (N, C, H, W) in batches of at most ``size``, with the model's device and dtype.

    Args:
        images: a tensor, or an iterable of batches: tensors, dictionaries with "image", or tuples that start with the
            images.
        model: determines device and dtype.
        size: largest number of images in a batch; None keeps the given batches.
        clips: also accept video clips (N, C, T, H, W).

    Raises:
        TypeError: not floating-point tensors.
        ValueError: wrong number of dimensions, values that are not finite, or no images.
    """
    device, dtype = place(model)
    empty = True
    for batch in batched(images):
        batch = pixels(batch, clips=clips)
        for part in batch.split(size or max(len(batch), 1)):
            if len(part):
                empty = False
                yield part.to(device, dtype)
    if empty:
        raise ValueError("images is empty: give at least one image.")


def batched(images: object) -> Iterable[Any]:
    """Return an iterable of batches; a tensor is one batch. Raises TypeError for anything else."""
    if not isinstance(images, Iterable):
        raise TypeError(f"images must be a tensor (N, C, H, W), or batches of them; got {images!r}.")
    return [images] if isinstance(images, Tensor) else images


def is_size(images: object) -> bool:
    """Return whether images are given by their size alone: a side, or (rows, columns)."""
    sides = images if isinstance(images, (tuple, list)) else [images]
    return bool(sides) and all(isinstance(side, Integral) for side in sides)


def made_up(model: nn.Module, size: Any, count: int, *, noise: bool) -> Tensor:
    """Return black images of a size, or images of normal noise from a fixed seed.

    They have the channels of the model's first convolution (3 without one). If that is an nn.Conv3d, they are clips of
    16 frames, (N, C, 16, H, W).

    Args:
        model: determines the number of channels.
        size: a side in pixels, or (rows, columns).
        count: N.
        noise: normal noise instead of black.

    Raises:
        TypeError, ValueError: ``size`` is not a size, or not positive.
    """
    if not is_size(size):
        raise TypeError(
            f"images must be a tensor (N, C, H, W), or a size, the side or (rows, columns); got {type(size).__name__}."
        )
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    frames = (_FRAMES,) if isinstance(first, nn.Conv3d) else ()
    shape = count, 3 if first is None else first.in_channels, *frames, *_checks.pair("images", size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) if noise else torch.zeros(shape)


@contextmanager
def running(model: nn.Module, images: Tensor, given: Tensor | None = None) -> Iterator[None]:
    """Turn the errors of networks that reject the images' size into a ValueError that names the size.

    ``given`` are the original images, if ``images`` are crops of them.
    """
    try:
        yield
    except (RuntimeError, AssertionError, ValueError) as error:
        hint = turned(model, (images if given is None else given).shape)
        if isinstance(error, ValueError) and not hint:  # its message is already clear
            raise
        raise ValueError(
            f"{type(model).__name__} cannot be run on images of {tuple(images.shape[1:])}: "
            f"{(str(error) or type(error).__name__).splitlines()[0].rstrip('.!')}.{hint}"
        ) from error


def turned(model: nn.Module, shape: Sequence[int]) -> str:
    """Return a hint for images that seem to be (N, H, W, C); empty for others."""
    takes = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    looks = len(shape) == 4 and takes == shape[3] != shape[1]
    return " They look like (N, H, W, C): pass images.movedim(-1, 1)." if looks else ""


def layer_name(model: nn.Module, layer: object) -> str:
    """Return the name of a layer of a model, given by name or as the module.

    Raises:
        TypeError: another type.
        ValueError: the model has no such layer; the message suggests similar names.
    """
    known: dict[str, nn.Module] = dict(model.named_modules())
    if isinstance(layer, nn.Module):
        for name, module in known.items():
            if module is layer:
                return name
        raise ValueError(
            f"layer must be a module of the model; this {type(layer).__name__} does not belong to "
            f"{type(model).__name__}. Take it from the model that you pass, not from a copy."
        )
    if not isinstance(layer, str):
        raise TypeError(
            f"layer must be the name of one module, such as {_example(known)!r}, or the module itself; got "
            f"{type(layer).__name__}."
        )
    if layer not in known:
        raise ValueError(f"{type(model).__name__} has no layer {layer!r}.{_checks.did_you_mean(layer, known)}")
    return layer


def submodule(model: nn.Module, layer: object) -> nn.Module:
    """Return a layer of a model, given as in :func:`layer_name`."""
    return model.get_submodule(layer_name(model, layer))


def _example(known: Mapping[str, nn.Module]) -> str:
    """Return an example of a layer name: the last child with convolutions, or the last child."""
    names = [name for name in known if name and "." not in name]
    maps = [name for name in names if any(isinstance(module, nn.Conv2d) for module in known[name].modules())]
    return (maps or names or [""])[-1]


def never_called(model: nn.Module, layer: str) -> ValueError:
    """Return the error for a layer that the model does not call."""
    return ValueError(
        f"layer {layer!r} of {type(model).__name__} is never called in evaluation mode, like heads used only in "
        "training. Choose a layer that the images pass through, or None for the default."
    )


def last_maps(model: nn.Module, images: Tensor) -> list[str]:
    """Return the names of the layers that return a map of ``images``, in the order in which they finish.

    Only layers of the model's backbone count (:func:`widefield.surgery.anatomy.anatomy`), for timm models those
    of ``forward_features``; all layers if the backbone has none. The last one is what necks and heads receive. Nested
    modules that return the same tensor each have an entry, the outermost last. The model's own name is "".
    """
    names: list[str] = []
    size, hint = images.shape[2:], map_hint(model)

    def see(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if inner_map(output, size, **hint) is not None:
            names.append(name)

    run = getattr(model, "forward_features", model)
    with running(model, images), visited(model), torch.no_grad(), watched(dict(model.named_modules()), see):
        run(images)
    backbone = anatomy(model).backbone
    return [name for name in names if is_inside(name, backbone)] or names


def track(steps: Iterable[T], text: str, *, total: int | None = None, show: bool) -> Iterator[T]:
    """Yield ``steps``, with a progress bar if ``show`` is true and stderr is a terminal, or this is a notebook."""
    if not show:
        yield from steps
        return
    from widefield._progress import ProgressLine, progress_console

    with ProgressLine(progress_console()) as bar:
        yield from bar.track(steps, total=total, description=text)
