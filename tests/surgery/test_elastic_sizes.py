"""Models with kernel sizes to choose: conversion, drawing of sizes in training, and plain networks of chosen sizes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch import nn

import widefield
from tolerances import NETWORK, close
from widefield.nn import DepthwiseConv2d, ElasticConv2d
from widefield.surgery import choose_sizes, draw_sizes, elastic_layers

NETWORKS = {
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "test_resnet": {},
    "tf_efficientnet_lite0": {},  # its convolutions with strides pad like TensorFlow
}
IMAGES = torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(0))


def created(name: str, **arguments: Any) -> nn.Module:
    return timm.create_model(name, num_classes=5, **NETWORKS[name], **arguments).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_conversion_keeps_the_function_and_merging_gives_the_chosen_sizes(name: str) -> None:
    model = created(name)
    expected = model(IMAGES)
    layers = elastic_layers(elastic := widefield.convert(model, widefield.Elastic((3, 7))))
    assert layers
    close(elastic(IMAGES), expected, NETWORK)
    close(widefield.reparameterize(elastic, IMAGES)(IMAGES), expected, NETWORK)

    choose_sizes(elastic, 7)
    close(elastic(IMAGES), expected, NETWORK)  # taps that the kernels did not have are zero
    last = list(layers)[-1]
    choose_sizes(elastic, {last: 3})
    cropped = widefield.reparameterize(elastic, IMAGES)
    plain = [m for m in cropped.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1]
    assert {m.kernel_size[0] for m in plain} >= {3, 7}
    close(cropped(IMAGES), elastic(IMAGES), NETWORK)


def test_resizing_grows_and_crops_plain_convolutions() -> None:
    model = created("convnext_atto")
    larger = widefield.convert(model, widefield.Resize(9))
    close(larger(IMAGES), model(IMAGES), NETWORK)
    kinds = {(type(m), m.kernel_size) for name, m in larger.named_modules() if name.endswith("conv_dw")}
    assert kinds == {(DepthwiseConv2d, (9, 9))}
    assert {k: v.shape for k, v in larger.state_dict().items() if "conv_dw.weight" not in k} == {
        k: v.shape for k, v in model.state_dict().items() if "conv_dw.weight" not in k
    }
    smaller = widefield.convert(larger, widefield.Resize(3), "stages.0.*")
    elastic = widefield.convert(model, widefield.Elastic((3,)))
    choose_sizes(elastic, {name: 3 for name in elastic_layers(elastic) if name.startswith("stages.0.")})
    close(smaller(IMAGES), elastic(IMAGES), NETWORK)


def network(stages: int = 3, per_stage: int = 2) -> nn.Module:
    """Return elastic layers of some stages."""
    layers = [ElasticConv2d(1, 1) for _ in range(stages * per_stage)]
    for index, layer in enumerate(layers):
        layer.stage = index // per_stage
    return nn.Sequential(*layers)


def test_sizes_are_drawn_for_the_network_its_stages_or_its_layers() -> None:
    model, kinds, sizes = network(), Counter[str](), Counter[int]()
    for step in range(1500):
        draw_sizes(model, 0, step)
        drawn = [layer.drawn for layer in elastic_layers(model).values()]
        sizes.update(drawn[:1])
        by_stage = all(a == b for a, b in zip(drawn[::2], drawn[1::2], strict=True))
        kinds["network" if len(set(drawn)) == 1 else "stage" if by_stage else "layer"] += 1
    assert set(sizes) == {3, 5, 7, 11}
    assert all(300 < count < 450 for count in sizes.values())  # 375 each
    # Of the draws by stage a sixteenth is one size, and of those by layer a 64th agrees in all stages.
    assert 450 < kinds["network"] < 620
    assert 390 < kinds["stage"] < 560
    assert 420 < kinds["layer"] < 570


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    model, other = network(), network()

    def drawn(net: nn.Module, seed: int, step: int) -> list[int | None]:
        draw_sizes(net, seed, step)
        return [layer.drawn for layer in elastic_layers(net).values()]

    torch.manual_seed(3)
    assert [drawn(model, 0, s) for s in range(20)] == [drawn(other, 0, s) for s in range(20)]
    assert [drawn(model, 0, s) for s in range(20)] != [drawn(model, 1, s) for s in range(20)]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"1": 5, "9": 3}, "'9' is not an elastic convolution"), ({"1": 4}, "one of this layer's, 3, 5, 7, 11; got 4")],
)
def test_wrong_choices_change_nothing(sizes: dict[str, int], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        choose_sizes(model, sizes)
    assert {layer.kernel_size for layer in elastic_layers(model).values()} == {11}
