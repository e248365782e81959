"""timm's own networks of these families, which widefield does not reimplement, with every verb."""

import pytest
import timm
import torch
from test_convert import unsettled

import widefield
from tolerances import NETWORK
from widefield import bench

SHALLOW = {"depths": (1, 1, 2, 1)}
NETWORKS = {
    "convnext_atto": SHALLOW,
    "convnextv2_atto": SHALLOW,
    "focalnet_tiny_srf": {},
    "inception_next_atto": SHALLOW,
    "mobilenetv2_050": {},
    "poolformer_s12": {},
    "test_resnet": {},
}
"""Name in timm -> arguments; timm fixes the depths of the others."""
CONFIGS = {
    "Deformable": widefield.Deformable(),
    "FastDepthwise": widefield.FastDepthwise(),
    "GMConv": widefield.GMConv(),
    "InceptionSplit": widefield.InceptionSplit(),
    "LargeKernel": widefield.LargeKernel(13),
    "MoRF": widefield.MoRF((3, 5, 7, 11)),
}
KEEPS = {"FastDepthwise", "GMConv", "LargeKernel", "MoRF"}
NOTHING = {  # networks without convolutions for it
    ("FastDepthwise", "poolformer_s12"): True,
    ("FastDepthwise", "test_resnet"): True,
    ("InceptionSplit", "poolformer_s12"): True,
    ("InceptionSplit", "test_resnet"): True,
    ("LargeKernel", "poolformer_s12"): True,
    ("LargeKernel", "test_resnet"): True,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_conversion_takes_every_network(name, kind):
    config, x = CONFIGS[kind], torch.randn(2, 3, 64, 64)
    model = unsettled(timm.create_model(name, num_classes=5, **NETWORKS[name]))
    if NOTHING.get((kind, name)):
        with pytest.raises(ValueError, match="can be converted"):
            widefield.convert(model, config)
        return
    plan = widefield.plan(model, config)
    converted = widefield.convert(model, config)
    assert plan.replaced
    if kind in KEEPS:
        assert widefield.compare(model, converted, x).relative <= NETWORK
    if kind in ("FastDepthwise", "GMConv", "LargeKernel", "MoRF"):
        fused = widefield.reparameterize(converted, x)
        assert widefield.compare(converted, fused, x).relative <= NETWORK
        assert bench.cost(fused.to("meta"), x.to("meta")).macs > 0
    loss = converted.train()(x).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in converted.parameters() if p.requires_grad)
