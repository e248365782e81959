"""The verbs on a trained network: EfficientNet-Lite0 with ImageNet weights still classifies photographs correctly."""

import pytest
import torch

import widefield
from realweights import efficientnet_lite0, photographs
from widefield import deploy

KEEPING = {
    "MoRF": widefield.MoRF((3, 5, 7)),
    "MoRF hard": widefield.MoRF((3, 5, 7), routing="hard"),
    "GMConv": widefield.GMConv(),
    "GMConv dynamic": widefield.GMConv(body="dynamic"),
    "FastDepthwise": widefield.FastDepthwise(),
    "LargeKernel": widefield.LargeKernel(13),
    "LargeKernel dilated": widefield.LargeKernel(13, branches="dilated"),
}


@pytest.fixture(scope="module")
def model():
    return efficientnet_lite0()


def top5(model, x=None):
    with torch.no_grad():
        return model(photographs() if x is None else x).topk(5).indices


def test_the_photographs_are_recognized(model):
    temple, flower = top5(model)[:10, 0], top5(model)[10:, 0]
    assert (temple == 698).sum() >= 6  # palace
    assert (flower == 985).sum() >= 8  # daisy


@pytest.mark.parametrize("kind", KEEPING)
def test_converted_and_reparameterized_it_has_the_same_top_five(model, kind):
    converted = widefield.convert(model, KEEPING[kind])
    assert len(widefield.plan(model, KEEPING[kind]).replaced) >= 16  # of 17 depthwise ones, strided included
    x = photographs()[::4]  # of both photographs
    assert top5(converted, x).equal(top5(model, x))
    fused = widefield.reparameterize(converted, x[:2])
    assert top5(fused, x).equal(top5(model, x))


def test_trimmed_and_specialized_it_has_the_same_top_five(model):
    fused = widefield.reparameterize(widefield.convert(model, widefield.LargeKernel(13)))
    trimmed = widefield.trim(fused, 1e-4, example_input=224)
    assert sum(p.numel() for p in trimmed.parameters()) < sum(p.numel() for p in fused.parameters())
    assert top5(trimmed).equal(top5(model))
    mixture = widefield.convert(model, widefield.MoRF((3, 5, 7)))
    static = widefield.specialize(mixture, photographs().split(10))
    assert not any(isinstance(module, widefield.nn.MoRFConv2d) for module in static.modules())
    assert top5(static).equal(top5(model))


@pytest.mark.parametrize("kind", ["plain", pytest.param("MoRF", marks=pytest.mark.slow)])
def test_exported_it_has_the_same_top_five(model, kind, tmp_path):
    exported = model if kind == "plain" else widefield.convert(model, KEEPING[kind])
    exported = widefield.reparameterize(exported, photographs()[:2])
    widefield.export(exported, tmp_path / "lite0.onnx", photographs()[:2], loader=photographs().split(10))
    assert top5(deploy.load(tmp_path / "lite0.onnx")).equal(top5(model))


@pytest.mark.slow
def test_in_8_bits_it_names_the_same_classes(model, tmp_path):
    fused = widefield.reparameterize(model, photographs()[:2])
    report = widefield.quantize(fused, tmp_path / "lite0.onnx", photographs().split(10))
    assert report.change.agreement >= 0.9
    found = top5(deploy.load(tmp_path / "lite0.onnx"))
    kept = (top5(model)[:, :, None] == found[:, None]).any(2).float().mean()
    assert kept >= 0.8  # of five classes, of which the last have almost equal scores
