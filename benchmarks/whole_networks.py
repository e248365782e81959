"""The networks of benchmarks/whole_models.py: as the field runs them ("stock"), and as widefield does ("ours").

Stock is timm's or torchvision's own network where there is one, for UPerNet that of segmentation-models-pytorch, for
Mask R-CNN torchvision's. The others are our networks with plain ``torch.nn.Conv2d`` layers and ``F.grid_sample``, and
in inference merged as far as the official code merges them. Ours is merged with ``reparameterize`` and has our
depthwise layers (``FastDepthwise``). Weights are random: they do not change the times.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

import widefield.models  # noqa: F401  registers our networks
from widefield.benchmarks import model as classifiers
from widefield.nn import DCNv3, DepthwiseConv2d
from widefield.nn.depthwise import bare
from widefield.surgery import FastDepthwise, NothingToFuseError, convert, reparameterize
from widefield.surgery.plain import with_numbers

OURS = "ours"
MODES = ("inference", "step")

Models = dict[str, nn.Module]


@dataclass(frozen=True)
class Network:
    """A network of the table.

    Args:
        title: its name in the table.
        batch, size: images of a call, and their side in pixels.
        name: in timm's registry, ours included, or of a backbone.
        kind: "timm", "zoo" (ours), "upernet" or "mask_rcnn".
        torchvision: name of torchvision's network, and the arguments that switch off its dropout; timm's has none.
        merge: method of our network that merges what the official code merges.
    """

    title: str
    batch: int
    size: int
    name: str
    kind: str = "zoo"
    torchvision: tuple[str, dict[str, Any]] | None = None
    merge: str | None = None

    def images(self) -> Tensor:
        """Return the images of a call."""
        return torch.randn(self.batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))


NETWORKS = (
    Network("ConvNeXt-T", 4, 224, "convnext_tiny", "timm", ("convnext_tiny", {"stochastic_depth_prob": 0.0})),
    Network("RepLKNet-31B", 1, 224, "replknet_31b", merge="structural_reparam"),
    Network("UniRepLKNet-T", 2, 224, "unireplknet_t", merge="reparameterize_unireplknet"),
    Network("SLaK-T", 1, 224, "slak_tiny"),
    Network("InternImage-T", 2, 224, "internimage_t"),
    Network("VAN-B2", 2, 224, "van_b2"),
    Network("HorNet-T", 4, 224, "hornet_tiny_7x7"),
    Network("MogaNet-S", 2, 224, "moganet_small"),
    Network(
        "EfficientNet-B0", 8, 224, "efficientnet_b0", "timm",
        ("efficientnet_b0", {"stochastic_depth_prob": 0.0, "dropout": 0.0}),
    ),
    Network("MobileNetV2", 16, 224, "mobilenetv2_100", "timm", ("mobilenet_v2", {"dropout": 0.0})),
    # Two images, as a batch norm after pooling to one pixel needs them; of 512 pixels a step takes minutes here.
    Network("UPerNet, ConvNeXt-T", 2, 256, "convnext_tiny", "upernet"),
    Network("Mask R-CNN, ResNet-50", 1, 640, "resnet50", "mask_rcnn"),
)  # fmt: skip

Built = tuple[Models, Callable[[str, nn.Module, Tensor], Callable[[], object]]]
"""Name -> network, stock ones first and ours last; and what makes a call of (name, network, images)."""


def built(network: Network, mode: str) -> Built:
    """Return the networks of a row in evaluation mode, or in training mode for "step", and how to call them."""
    torch.manual_seed(0)
    models, call = _BUILDERS[network.kind](network, mode)
    return {name: model.train(mode == "step") for name, model in models.items()}, call


def _timm(network: Network, mode: str) -> Built:
    models: Models = {"timm": timm.create_model(network.name)}
    if network.torchvision is not None:
        name, options = network.torchvision
        models["torchvision"] = torchvision.models.get_model(name, weights=None, **options)
    models[OURS] = _ours(models["timm"], network, mode)
    return models, _classifier(mode)


def _zoo(network: Network, mode: str) -> Built:
    model = timm.create_model(network.name).eval()
    stock = copy.deepcopy(model)
    if network.merge is not None and mode == "inference":
        getattr(stock, network.merge)()
    return {"plain PyTorch": plain(stock), OURS: _ours(model, network, mode)}, _classifier(mode)


def _upernet(network: Network, mode: str) -> Built:
    import segmentation  # needs segmentation-models-pytorch

    models = segmentation.models(network.name, torch.randn(1, 3, network.size, network.size))[mode]
    stock, ours = models["smp"], models["widefield"]
    return {"smp": stock, OURS: _ours(ours, network, mode)}, lambda _, model, x: segmentation.call(model, x, mode)


def _mask_rcnn(network: Network, mode: str) -> Built:
    import detection

    models = detection.models(network.size, network.name, limits={"proposals": 1000, "detections": 100})
    stock, ours = models[detection.PEER], models["widefield"]
    return (
        {detection.PEER: stock, OURS: _ours(ours, network, mode)},
        lambda name, model, x: detection.call(name, model, x, mode),
    )


_BUILDERS: dict[str, Callable[[Network, str], Built]] = {
    "timm": _timm, "zoo": _zoo, "upernet": _upernet, "mask_rcnn": _mask_rcnn,
}  # fmt: skip


def _classifier(mode: str) -> Callable[[str, nn.Module, Tensor], Callable[[], object]]:
    return lambda _, model, x: classifiers.call(model, x, mode)


def _ours(model: nn.Module, network: Network, mode: str) -> nn.Module:
    """Return what a user of widefield runs: merged in inference, with our depthwise layers."""
    if mode == "inference":
        model = merged(model, network)
    try:
        return convert(model, FastDepthwise())
    except ValueError:  # it has none, or ours already
        return model


def merged(model: nn.Module, network: Network) -> nn.Module:
    """Return the reparameterized network, or the network itself if nothing in it can be merged."""
    try:
        return reparameterize(model.eval(), (1, 3, network.size, network.size))
    except NothingToFuseError:
        return model.eval()


def plain(model: nn.Module) -> nn.Module:
    """Replace our operators by PyTorch's own, in place: depthwise convolutions, and sampling by F.grid_sample."""
    for name, layer in list(_depthwise(model)):
        conv = bare(layer, bias=layer.bias is not None)
        conv.weight, conv.bias = layer.weight, layer.bias
        model.set_submodule(name, with_numbers(conv.train(layer.training)))
    for layer in model.modules():
        if isinstance(layer, DCNv3):
            layer.backend = "grid"
    return model


def _depthwise(model: nn.Module) -> Iterator[tuple[str, DepthwiseConv2d]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, DepthwiseConv2d))
