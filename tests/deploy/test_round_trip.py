"""Training form, reparameterized form, ONNX and onnxruntime agree for all registered and converted networks."""

import pytest
import timm
import torch
import torchvision
from networks import NAMES, settled, small

import widefield
from tolerances import NETWORK, close
from widefield import deploy

QUICK = ("replknet_31b",)
CONVERTED = {
    "a small resnet with mixtures": lambda: (
        timm.create_model("test_resnet", num_classes=7),
        widefield.MoRF((3, 5)),
        "layer3.*",
    ),
    "resnet18 with mixtures": lambda: (
        timm.create_model("resnet18", num_classes=7),
        widefield.MoRF((3, 5)),
        "layer[12].*",
    ),
    "convnext_atto with masks for each image": lambda: (
        timm.create_model("convnext_atto", num_classes=7, depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)),
        widefield.GMConv(body="dynamic"),
        "*conv_dw",
    ),
    "torchvision's mobilenet_v2 with large kernels": lambda: (
        torchvision.models.mobilenet_v2(num_classes=7, width_mult=0.35),
        widefield.LargeKernel(13),
        None,
    ),
    "torchvision's convnext_tiny with mixtures": lambda: (
        torchvision.models.ConvNeXt(
            [torchvision.models.convnext.CNBlockConfig(c, d, 1) for c, d in ((16, 24), (24, 32), (32, 40), (40, None))],
            num_classes=7,
        ),
        widefield.MoRF((3, 7, 11), routing="hard"),
        None,
    ),
    "regnety_002 with deformable sampling": lambda: (
        timm.create_model("regnety_002", num_classes=7),
        widefield.Deformable(),
        None,
    ),
}
QUICKLY_CONVERTED = ("a small resnet with mixtures",)


def some_slow(names, quick):
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


def holds(model, folder):
    x = torch.randn(2, 3, 64, 64)
    fused = widefield.reparameterize(model, x)
    for routing in deploy.ROUTING:
        done = deploy.export(fused, folder / "model.onnx", x, routing=routing, tolerance=NETWORK)
        exported = deploy.load(folder / "model.onnx")
        for batch in (1, 3, 8):
            x = torch.randn(batch, 3, 64, 64)
            with torch.no_grad():
                close(exported(x), model(x), NETWORK)
        assert [check.shape[0] for check in done.checks] == [1, 3, 8]
        if done.routing is None:
            return


@pytest.mark.parametrize("name", some_slow(NAMES, QUICK))
def test_every_registered_network(tmp_path, name):
    holds(settled(small(name)), tmp_path)


@pytest.mark.parametrize("name", some_slow(CONVERTED, QUICKLY_CONVERTED))
def test_converted_networks(tmp_path, name):
    model, conversion, where = CONVERTED[name]()
    model = settled(widefield.convert(model, conversion, where))
    with torch.no_grad():  # image-dependent routing, nonzero offsets
        for parameter in model.parameters():
            if not parameter.any():
                parameter.add_(0.02 * torch.randn_like(parameter))
    holds(model, tmp_path)
