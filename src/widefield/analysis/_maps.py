"""Read layer outputs as maps of positions, and pass them through a module that can be hooked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, cat, nn

from widefield.surgery.answers import described, exchanged, meant, tensors


def as_map(
    output: Any, images: Sequence[int], *, layout: str | None = None, prefix: int | None = None
) -> Tensor | None:
    """Return a layer's output as a map (N, C, h, w) that gradients flow through, or None if it is not a map.

    A map keeps the images' proportions. Accepted forms are (N, C, h, w), (N, h, w, C) as in Swin, and tokens (N, L, C)
    as in ViT, of which the last h*w stand for positions. For video clips, time steps count as channels: (N, C, t, h,
    w), (N, t, h, w, C) and tokens for t*h*w positions become (N, C*t, h, w).

    Args:
        output: what a module returned.
        images: (H, W) of the images, or (T, H, W) of the clips.
        layout: "NCHW" or "NHWC" if known; used only where both would fit.
        prefix: number of leading tokens that do not stand for positions; None: the fewest that fit.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    if output.ndim == len(images) + 2 > 3:
        last = _channels_last(output.shape, images, layout)
        if last is None:
            return None
        found = output.movedim(-1, 1) if last else output
        return found.flatten(1, 2) if len(images) == 3 else found
    if output.ndim == 3 and len(images) == 3:
        return _of_clip(output, images)
    if output.ndim == 3:
        length = output.shape[1]
        for extra in range(9) if prefix is None else (prefix,):
            sides = _sides(length - extra, images)
            if sides:
                return output[:, extra:].transpose(1, 2).reshape(len(output), -1, *sides)
    return None


def _channels_last(shape: Sequence[int], images: Sequence[int], layout: str | None) -> bool | None:
    """Return whether the channels of a map of this shape come last; None if it is not a map of such images."""
    frames, size = images[:-2], images[-2:]
    first, last = (
        _similar(sides[-2:], size) and all(t <= most for t, most in zip(sides[:-2], frames, strict=True))
        for sides in (shape[2:], shape[1:-1])
    )
    if first and (layout != "NHWC" or not last):
        return False
    return True if last else None


def _of_clip(tokens: Tensor, clip: Sequence[int]) -> Tensor | None:
    """Return :func:`as_map` of tokens (N, L, C) for clips (T, H, W), with at most one extra token.

    Among several splits into time and space, the one with the most time steps is chosen, as strides in time are small.
    """
    frames, size = clip[0], clip[1:]
    for extra in (0, 1):
        length = tokens.shape[1] - extra
        for steps in (t for t in range(frames, 0, -1) if frames % t == length % t == 0):
            sides = _sides(length // steps, size)
            if sides:
                return tokens[:, extra:].transpose(1, 2).reshape(len(tokens), -1, *sides)
    return None


def _similar(sides: Sequence[int], images: Sequence[int]) -> bool:
    """Return whether a map of these sides fits images of that size: the same stride along both axes, up to rounding."""
    h, w = sides
    H, W = images
    return 1 < h * w <= H * W and abs(h - w * H / W) <= 1 + 1e-6 and (H != W or h == w)


def _sides(places: int, images: Sequence[int]) -> tuple[int, int] | None:
    H, W = images
    h = round((max(places, 0) * H / W) ** 0.5)
    if h and places % h == 0 and _similar((h, places // h), images):
        return h, places // h
    return None


def inner_map(output: Any, images: Sequence[int], **hint: Any) -> tuple[Tensor, Tensor] | None:
    """Return the only map in a layer's output, as (the tensor in the output, :func:`as_map` of it), or None.

    The map may stand alone, next to other values (sizes, None, attention weights), or under the key "out".
    """
    one = meant(output)
    candidates = tensors(output) if one is None else [one]
    maps = [(tensor, found) for tensor in candidates if (found := as_map(tensor, images, **hint)) is not None]
    return maps[0] if len(maps) == 1 else None


def map_hint(model: nn.Module) -> dict[str, Any]:
    """Return what a timm model states about its map layout, as keyword arguments of :func:`as_map`."""
    return {"layout": getattr(model, "output_fmt", None), "prefix": getattr(model, "num_prefix_tokens", None)}


def no_map(output: Any) -> str:
    """Describe what a layer returned instead of one map, with a suggestion."""
    several = not isinstance(output, Tensor) and len(tensors(output)) > 1
    return described(output) + (": choose a layer inside it that returns one of them" if several else "")


@contextmanager
def tapped(model: nn.Module, layer: str, size: Sequence[int]) -> Iterator[list[Tensor]]:
    """Collect a layer's maps (N, C, h, w), a leaf of the graph for each call, and let the model go on from them.

    Gradients of what is computed after the layer flow into the leaves, whatever the layer's layout: tokens,
    channels-last maps and clips are read as maps and laid out as before.
    """
    taps: list[Tensor] = []
    hint = map_hint(model)

    def lead(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        found = inner_map(output, size, **hint)
        if found is None:
            got = "shape " * isinstance(output, Tensor) + no_map(output)
            raise ValueError(f"layer {layer!r} returns no map of images of {tuple(size)} pixels: got {got}.")
        inside, seen = found
        taps.append(seen.detach().clone().requires_grad_())  # a copy, as other code may change the map in place
        led = taps[-1].clone()  # the next layer may work in place
        return exchanged(output, inside, _laid_out(led, inside, size, hint["layout"]))

    handle = model.get_submodule(layer).register_forward_hook(lead)
    try:
        yield taps
    finally:
        handle.remove()


def _laid_out(led: Tensor, given: Tensor, images: Sequence[int], layout: str | None) -> Tensor:
    """Return a map made by :func:`as_map` from ``given`` in the layout of ``given``."""
    if given.ndim == 3:
        tokens = led.reshape(len(led), given.shape[2], -1).transpose(1, 2)
        return cat([given[:, : given.shape[1] - tokens.shape[1]], tokens], 1)
    last = _channels_last(given.shape, images, layout)
    channels = given.shape[-1 if last else 1]
    led = led.unflatten(1, (channels, -1)) if given.ndim == 5 else led
    return led.movedim(1, -1) if last else led
