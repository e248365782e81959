"""Prove that nothing visible depends on what is masked, for any network, known or not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from widefield.analysis._model import running
from widefield.masking.visibility import Visibility

_GRID = 3, 5
"""Patches of the images that are tried. The sides of maps then tell which axes are rows and columns."""
_NOISE = 3.0


@dataclass(frozen=True)
class Leak:
    """A module that lets visible positions depend on masked ones.

    Attributes:
        name: of the module, the innermost of those that leak.
        module: its class.
        training: whether it was in training mode.
    """

    name: str
    module: str
    training: bool

    def __str__(self) -> str:
        return f"{self.name or 'the network itself'} ({self.module})"


def leak(
    network: nn.Module, visibility_of: Callable[[nn.Module], Visibility], patch: int, channels: int = 3
) -> Leak | None:
    """Return the first module of a network whose visible outputs depend on masked positions, or None.

    The network runs twice in each mode, as a copy in float64, on images that agree at visible patches only. After every
    module, whatever is at masked positions is replaced by other noise in each run. Visible positions must then be equal
    to the last bit, in the output of every module. This also finds operations without a module, and statistics that
    count masked positions.

    Args:
        network: returns maps.
        visibility_of: applies the rules to a network and returns what they read.
        patch: side of a patch in pixels, a multiple of all strides.
        channels: of the images.

    Raises:
        ValueError: the network accepts images of one size only.
    """
    twin = copy.deepcopy(network).double()
    visibility = visibility_of(twin)
    rows, columns = _GRID
    mask = torch.rand(2, rows * columns, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1) < 9
    mask = mask.unflatten(1, _GRID)
    image = torch.randn(2, channels, rows * patch, columns * patch, dtype=torch.float64, generator=_generator(0))
    for training in (False, True):
        twin.train(training)
        before = copy.deepcopy(twin.state_dict())
        first = _outputs(twin, visibility, image, mask, seed=1)
        twin.load_state_dict(before)
        second = _outputs(twin, visibility, image, mask, seed=2)
        for (name, module, one), (_, _, other) in zip(first, second, strict=True):
            if not torch.equal(one, other):
                return Leak(name, module, training)
    return None


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def _outputs(
    network: nn.Module, visibility: Visibility, image: Tensor, mask: Tensor, seed: int
) -> list[tuple[str, str, Tensor]]:
    """Return name, class and visible outputs of every module, in the order in which they finish."""
    noise = _generator(seed)
    found: list[tuple[str, str, Tensor]] = []

    def noisy(x: Tensor) -> Tensor:
        """Replace masked positions, and record the others, if this is a map of the images."""
        seen = _seen(x, visibility)
        if seen is None:
            return x
        drawn = _NOISE * torch.randn(x.shape, dtype=torch.float64, generator=noise).to(x)
        return torch.where(seen, x, drawn)

    def watch(name: str, module: nn.Module) -> Callable[..., Any]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                return output
            seen = _seen(output, visibility)
            shown = output.detach().clone() if seen is None else torch.where(seen, output, 0.0)
            found.append((name, type(module).__name__, shown))
            return noisy(output)

        return hook

    with _hooked(network, watch), visibility.of(mask), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for what is dropped at random
        with running(network, image):
            network(noisy(image))
    return found


def _seen(x: Tensor, visibility: Visibility) -> Tensor | None:
    """Return the visible positions of a map of the images, in any order of axes, or None if this is no such map."""
    rows, columns = _GRID
    if x.ndim == 4:
        for last, (height, width) in ((False, x.shape[2:]), (True, x.shape[1:3])):
            if height * columns == width * rows and height % rows == 0:
                return visibility.positions(x, channels_last=last)
    elif x.ndim == 3 and x.shape[1] % (rows * columns) == 0:
        side = math.isqrt(x.shape[1] // (rows * columns))
        if side**2 * rows * columns == x.shape[1]:  # (N, H * W, C)
            map_like = x.new_empty(len(x), side * rows, side * columns, 1)
            return visibility.positions(map_like, channels_last=True).flatten(1, 2)
    return None


@contextmanager
def _hooked(network: nn.Module, watch: Callable[[str, nn.Module], Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(watch(name, module)) for name, module in network.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def leaking_pixels(seen: Callable[[Tensor], Tensor], images: Tensor, masked: Tensor) -> Tensor:
    """Return which masked pixels influence what is computed from images, bool (N, H, W).

    Args:
        seen: images (N, C, H, W) -> a tensor.
        images: at which derivatives are taken.
        masked: bool (N, H, W): pixels of masked patches.
    """
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(seen(images).square().sum(), images)
    influence: Tensor = (gradient != 0).any(1)
    return influence & masked
