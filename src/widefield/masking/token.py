"""Put a learned token at the masked positions of a map inside a network."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.surgery import anatomy
from widefield.surgery.answers import evaluating

TOKENS = ("replace", "scale", "add")
"""Ways to put a token at masked positions, see :class:`MaskToken`."""

_STAGES = 8
"""Stride of the last stage over that of stage 0, as in all published networks: 32 over 4."""
_IMAGE = 64, 96
"""Height and width of the image on which maps are looked at; their ratio tells which axes are rows and columns."""


class MaskToken(nn.Module):
    """A token at masked positions. Keys ``mask_token``, ``mask_gamma``.

    At masked positions the features x become, by ``mode``:

    - "replace": the token;
    - "scale": ``gamma x + token``, where gamma starts at 1e-6 (A2MIM);
    - "add": ``x + token``. This hides nothing; published settings of SimMIM for ConvNeXt have it.

    Args:
        channels: of the map.
        mode: see above.
    """

    mask_gamma: nn.Parameter | None

    def __init__(self, channels: int, *, mode: str = "replace") -> None:
        super().__init__()
        self.mode = _checks.choice("mode", mode, TOKENS)
        self.mask_token = nn.Parameter(torch.empty(1, channels, 1, 1))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        gamma = nn.Parameter(torch.full((1, channels, 1, 1), 1e-6)) if mode == "scale" else None
        self.register_parameter("mask_gamma", gamma)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """(N, C, H, W), and 1 at visible and 0 at masked positions (N, 1, H, W) -> (N, C, H, W)."""
        token = self.mask_token.to(x.dtype)
        if self.mode == "add":
            return x + token * (1 - visible)
        if self.mask_gamma is not None:
            token = x * self.mask_gamma.to(x.dtype) + token
        return x * visible + token * (1 - visible)


class Place(NamedTuple):
    """Where a token goes: into the input of a module.

    Attributes:
        module: see above.
        channels: of its input.
        channels_last: its input is (N, H, W, C).
    """

    module: nn.Module
    channels: int
    channels_last: bool


def token_place(network: nn.Module, stage: int) -> Place:
    """Return where the token of a stage is put.

    It is the stage itself, as published for ResNets. Where a stage begins with its own downsampling it is what follows:
    the ``blocks`` of a ConvNeXt, or the first module inside the stage that keeps the shape of its input.

    Args:
        network: a network with stages that :func:`widefield.surgery.anatomy` knows.
        stage: from 0, which is the first whose stride is at least an eighth of the last one's: 4 of 32 in published
            networks, and less in networks for small images.

    Raises:
        ValueError: the network has no such stage.
    """
    parts = anatomy(network)
    strides = [one.reduction for one in parts.stages]
    least = max((stride for stride in strides if stride), default=0) / _STAGES
    stages = [index for index, stride in enumerate(strides) if not stride or stride >= least]
    if stage >= len(stages):
        raise ValueError(f"there is no stage {stage} to put a token before: the network has {len(stages)} stages.")
    index = stages[stage]
    name = parts.stages[index].name
    inputs = _inputs(network)
    blocks = f"{name}.blocks"
    if f"{name}.downsample" in dict(network.named_modules()):
        chosen = blocks if blocks in inputs else f"{blocks}.0"
    elif name in inputs and not parts.ends_in_norm(index):
        chosen = name
    else:
        inside = (other for other in inputs if parts.stage_of(other) == index and _has_children(network, other))
        chosen = next((other for other in inside if inputs[other][0] == inputs[other][1]), "")
    if chosen not in inputs:
        raise ValueError(f"no module of stage {stage} ({name}) takes a map, into which a token could be put.")
    shape = inputs[chosen][0]
    last = shape[1] * _IMAGE[1] == shape[2] * _IMAGE[0]
    return Place(network.get_submodule(chosen), shape[-1] if last else shape[1], last)


def _has_children(network: nn.Module, name: str) -> bool:
    return next(network.get_submodule(name).children(), None) is not None


@torch.no_grad()
def _inputs(network: nn.Module) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Return the shapes of input and output of every module that maps a map to a map, in the order of their calls."""
    found: dict[str, tuple[torch.Size, torch.Size]] = {}
    started: list[str] = []

    def watch(name: str) -> Any:
        def before(module: nn.Module, inputs: Any) -> None:
            started.append(name)

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor) and inputs[0].ndim == 4:
                found.setdefault(name, (inputs[0].shape, output.shape))

        return before, after

    handles = []
    for name, module in network.named_modules():
        before, after = watch(name)
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    first = next(network.parameters())
    try:
        with evaluating(network):
            network(torch.zeros(1, 3, *_IMAGE, device=first.device, dtype=first.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[name] for name in dict.fromkeys(started) if name in found}
