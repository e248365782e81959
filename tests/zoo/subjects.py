"""Build the smallest model of every family in timm and torchvision, with weights that reveal errors, and an input."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

SIDES = (64, 128, 224, 256, 384)
"""Image sides to try; the first one that a network accepts is used."""


@dataclass(frozen=True)
class Subject:
    """A network in evaluation mode, its input, and a loss to train it."""

    name: str
    model: nn.Module
    x: Tensor
    """(N, C, H, W), or video clips (N, C, T, H, W)."""
    loss: Callable[[nn.Module], Tensor]


def catalog() -> Iterator[str]:
    """Yield "timm:NAME" or "torchvision:NAME" of the smallest model, by parameters, of every family.

    A family is one Python module of either library.
    """
    families: dict[str, list[str]] = defaultdict(list)
    for name in timm.list_models():
        entrypoint = timm.model_entrypoint(name)
        families[entrypoint.__module__].append(f"timm:{name}")
    for name in torchvision.models.list_models():
        families[torchvision.models.get_model_builder(name).__module__].append(f"torchvision:{name}")
    for family in sorted(families):
        if not family.startswith("widefield."):  # tests/models covers those
            yield min(families[family], key=lambda name: (_parameters(name), name))


def _parameters(name: str) -> int:
    """Return the number of parameters of a model, built without memory for them if possible."""
    try:
        with torch.device("meta"):
            model = _built(name)
    except NotImplementedError:  # torchvision's RegNet reads tensor values
        model = _built(name)
    return sum(parameter.numel() for parameter in model.parameters())


def _built(name: str) -> nn.Module:
    library, _, name = name.partition(":")
    if library == "timm":
        return timm.create_model(name)
    builder = torchvision.models.get_model_builder(name)
    known = inspect.signature(builder).parameters
    options: dict[str, object] = {key: None for key in ("weights", "weights_backbone") if key in known}
    if "detection" in builder.__module__:
        # Keep every box, because random weights give scores below the usual thresholds, and do not enlarge images.
        prefix = "box_" if "rcnn" in name else ""
        options |= {f"{prefix}score_thresh": 0.0, f"{prefix}detections_per_img": 20}
        options |= {} if "ssd" in name else {"min_size": SIDES[0], "max_size": 2 * SIDES[0]}
    return builder(**options)


class FramePair(nn.Module):
    """Wrapper of an optical-flow network that takes one tensor (N, 6, H, W): two stacked frames."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.flow(x[:, :3].contiguous(), x[:, 3:].contiguous())


def subject(name: str) -> Subject:
    """Build a subject, seeded and in evaluation mode."""
    torch.manual_seed(0)
    model = _built(name)
    kind = type(model).__module__
    if "detection" in kind:
        # float64, so that rounding does not decide which of two boxes is dropped.
        model, inputs, loss = model.double(), [torch.rand(2, 3, 96, 64).double()], _detection_loss
    elif "optical_flow" in kind:
        model, inputs, loss = FramePair(model), [torch.rand(1, 6, 128, 128)], _squares
    elif "video" in kind:
        inputs, loss = [torch.randn(2, 3, t, s, s) for t, s in ((8, 64), (16, 112), (16, 224))], _squares
    else:
        inputs, loss = list(_images(model)), _squares
    x = _first_that_runs(model, inputs, loss)
    _shake(model.eval(), x)
    return Subject(name, model.eval(), x, lambda trained: loss(trained, x))


def _images(model: nn.Module) -> Iterator[Tensor]:
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 0, 0))
    if not config.get("fixed_input_size"):
        least = max(config.get("min_input_size", (3, 0, 0))[1:])
        yield from (torch.randn(2, channels, side, side) for side in SIDES if side >= least)
    if height:
        yield torch.randn(2, channels, height, width)


def _first_that_runs(model: nn.Module, inputs: Iterable[Tensor], loss: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """Return the first input that the model accepts in evaluation and in training mode, which may use more heads."""
    for x in inputs:
        try:
            with torch.no_grad():
                model.eval()(x)
            loss(model.train(), x)
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            said = error
        else:
            return x
    raise said


def _squares(model: nn.Module, x: Tensor) -> Tensor:
    outputs = (out for out in tree_leaves(model(x)) if isinstance(out, Tensor) and out.requires_grad)
    return torch.stack([out.square().mean() for out in outputs]).sum()


def _detection_loss(model: nn.Module, x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    box = torch.tensor([[4.0, 6.0, width - 8.0, height - 9.0]], dtype=x.dtype)
    target = {
        "boxes": box,
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, height, width, dtype=torch.uint8),
        "keypoints": torch.tensor([10.0, 12.0, 1.0]).expand(1, 17, 3),  # always float32
    }
    losses = model(list(x), [target] * len(x))
    return torch.stack(list(losses.values())).sum()


def _shake(model: nn.Module, x: Tensor) -> None:
    """Make every part of a network matter, because zeros and neutral norms hide mistakes.

    Batch norms take their statistics from ``x``, which keeps the scale. Everything with one dimension (norms, layer
    scales, biases) moves away from 0 and 1.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter.count_nonzero():
                continue
            if parameter.ndim > 1 or name.endswith("bias"):
                nn.init.normal_(parameter, std=0.02)
            else:
                parameter.copy_(parameter.clamp(min=0.3) + 0.1 * torch.rand_like(parameter))
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        with torch.no_grad():
            model(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
            # Maps of one or two pixels have almost no variance, and dividing by it would amplify rounding.
            norm.running_var.clamp_(min=max(1e-2, 0.3 * norm.running_var.mean().item()))


if __name__ == "__main__":
    print(*catalog(), sep="\n")
