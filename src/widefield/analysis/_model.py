"""How an analysis treats a model: as a guest. Modes, gradients and hooks are put back, also after an exception."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.surgery.outputs import pixels, place

T = TypeVar("T")


@contextmanager
def visited(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into evaluation mode without gradients for its parameters, and everything back at the end.

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
    """Call ``see(name, module, inputs, output)`` after every forward pass of these modules; hooks are removed."""
    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(lambda m, args, output, name=name: see(name, m, args, output)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def chunks(images: Tensor | Iterable[Any], model: nn.Module, size: int | None = None) -> Iterator[Tensor]:
    """Yield images (N, C, H, W) in batches of at most ``size``, on the model's device and in its type.

    Args:
        images: one tensor, or batches of them, such as a loader gives; dictionaries with "image" and pairs that begin
            with the images are taken as well.
        model: see above.
        size: images a batch; None: as they come.

    Raises:
        TypeError: not tensors of floating-point numbers.
        ValueError: not four dimensions, or no image at all.
    """
    device, dtype = place(model)
    empty = True
    for batch in [images] if isinstance(images, Tensor) else images:
        batch = pixels(batch)
        for part in batch.split(size or max(len(batch), 1)):
            if len(part):
                empty = False
                yield part.to(device, dtype)
    if empty:
        raise ValueError("there are no images: images is empty.")


@contextmanager
def running(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Turn what networks say to images that they are not made for into a ValueError that names the size."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be run on images of {tuple(images.shape[1:])}: "
            f"{(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Return the module called ``name`` in a model.

    Raises ValueError with what it might have been.
    """
    known: dict[str, nn.Module] = dict(model.named_modules())
    if name not in known:
        raise ValueError(f"{type(model).__name__} has no layer {name!r}.{_checks.did_you_mean(name, known)}")
    return known[name]


def as_map(
    output: Any, images: Sequence[int], *, layout: str | None = None, prefix: int | None = None
) -> Tensor | None:
    """Return a layer's output as a map (N, C, h, w) that gradients flow through, or None if it is none.

    A map keeps the images' proportions: (N, C, h, w) as it is; (N, h, w, C) as in Swin; tokens (N, L, C) of which the
    last h*w stand for places, as in ViT.

    Args:
        output: whatever a module returned.
        images: (H, W) of the images.
        layout: "NCHW" or "NHWC" where known; needed only where both would fit.
        prefix: tokens before those that stand for places; None: the fewest that fit.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    if output.ndim == 4:
        first, last = _similar(output.shape[2:], images), _similar(output.shape[1:3], images)
        if first and (layout != "NHWC" or not last):
            return output
        return output.movedim(-1, 1) if last else None
    if output.ndim == 3:
        length = output.shape[1]
        for extra in range(9) if prefix is None else (prefix,):
            sides = _sides(length - extra, images)
            if sides:
                return output[:, extra:].transpose(1, 2).reshape(len(output), -1, *sides)
    return None


def _similar(sides: Sequence[int], images: Sequence[int]) -> bool:
    """Whether a map of these sides can be one of images of that size: the same stride both ways, to rounding."""
    h, w = sides
    H, W = images
    return 1 < h * w <= H * W and abs(h - w * H / W) <= 1 + 1e-6 and (H != W or h == w)


def _sides(places: int, images: Sequence[int]) -> tuple[int, int] | None:
    H, W = images
    h = round((max(places, 0) * H / W) ** 0.5)
    if h and places % h == 0 and _similar((h, places // h), images):
        return h, places // h
    return None


def last_maps(model: nn.Module, images: Tensor) -> list[str]:
    """Return the names of the layers that give a map of ``images``, in the order in which they finish.

    Of a timm model those of its ``forward_features``, of any other model all. The last is what the head sees. Of
    modules that return the same tensor, one inside the other, each has its entry, the outermost last. The model's own
    entry is "".
    """
    names: list[str] = []
    size = images.shape[2:]
    layout, prefix = getattr(model, "output_fmt", None), getattr(model, "num_prefix_tokens", None)

    def see(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if as_map(output, size, layout=layout, prefix=prefix) is not None:
            names.append(name)

    run = getattr(model, "forward_features", model)
    with running(model, images), visited(model), torch.no_grad(), watched(dict(model.named_modules()), see):
        run(images)
    return names


def track(steps: Iterable[T], text: str, *, total: int | None = None, show: bool) -> Iterable[T]:
    """Return ``steps`` as they are, or behind a progress bar on the terminal."""
    if not show:
        return steps
    from rich.console import Console
    from rich.progress import track as bar

    return bar(steps, text, total=total, console=Console(stderr=True), transient=True)
