"""GMConv's masks against their formula, with sigmas set manually or predicted from prepared images."""

import json
import math

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from tolerances import FLOAT32
from widefield import surgery
from widefield.analysis.masks import masks
from widefield.nn import DynamicGMConv2d, GMConv2d


def formula(size, sigma_x, sigma_y):
    """Compute eq. 4 and 6 of the paper, tap by tap: exp(-(x^2 / sigma_x^2 + y^2 / sigma_y^2) / 2) over its maximum."""
    rows, columns = size
    mask = np.empty(size)
    for i in range(rows):
        for j in range(columns):
            y, x = i - (rows - 1) / 2, j - (columns - 1) / 2
            mask[i, j] = math.exp(-((x / sigma_x) ** 2 + (y / sigma_y) ** 2) / 2)
    return mask / mask.max()


def reader(layer, slope):
    """Make a dynamic layer predict sigma_1 = 1 + slope * (mean over all pixels), and ratio 1/2, for positive images."""
    with torch.no_grad():
        channels = layer.in_channels
        layer.predictor.hidden.weight.zero_()
        layer.predictor.hidden.weight[0, channels:] = 1 / channels  # maxima come first
        layer.predictor.out.weight.zero_()
        layer.predictor.out.weight[0, 0] = slope
        layer.predictor.out.bias.copy_(torch.tensor([1.0, 0.5]))
    return layer


@pytest.mark.parametrize("size", [(7, 7), (4, 4), (3, 8)])
@pytest.mark.parametrize("sigma", [0.6, 1.7, -1.7])
def test_a_static_mask_is_the_formula(size, sigma):
    layer = GMConv2d(2, 3, size, dilation=2, sigma=3.0)
    nn.init.constant_(layer.sigma, sigma)
    (found,) = masks(nn.Sequential(layer)).layers
    expected = formula(size, abs(sigma), abs(sigma))
    assert np.allclose(found.mask, expected, rtol=0, atol=FLOAT32)
    assert found.sigma == pytest.approx((abs(sigma), abs(sigma)))
    assert (found.name, found.stage, found.dynamic, found.size) == ("0", 0, False, size)
    assert (found.dilation, found.start, found.spread) == ((2, 2), 3.0, (0.0, 0.0))
    assert found.extent == pytest.approx((expected.max(0).sum(), expected.max(1).sum()))
    assert found.share == pytest.approx(math.prod(found.extent) / math.prod(size))


def test_extents_lie_between_one_tap_and_all():
    layer = GMConv2d(1, 1, 9)
    extents = []
    for sigma in (0.0, 1.5, 1e9):
        nn.init.constant_(layer.sigma, sigma)
        extents.append(masks(layer).layers[0].extent[0])
    assert extents[0] == pytest.approx(1.0, abs=1e-3)  # the smallest sigma is a quarter of a tap
    assert extents[1] == pytest.approx(sum(math.exp(-(d**2) / 4.5) for d in range(-4, 5)))
    assert extents[2] == pytest.approx(9.0, rel=1e-3)


def test_a_dynamic_mask_is_averaged_over_the_images():
    model = nn.Sequential(reader(DynamicGMConv2d(3, 4, 5, padding=2, sigma=1.0), 2.0))
    levels = torch.tensor([0.1, 0.5, 0.9, 0.2, 0.7])
    images = levels[:, None, None, None].expand(5, 3, 8, 8)
    sigma = (1 + 2 * levels).double().numpy()
    expected = np.mean([formula((5, 5), s, s / 2) for s in sigma], 0)
    for given, batch in ((images, 8), (images, 2), ([images[:1], {"image": images[1:]}], 3)):
        result = masks(model, given, batch_size=batch)
        (found,) = result.layers
        assert result.about["dynamic masks"] == "mean over 5 images"
        assert found.dynamic
        assert np.allclose(found.mask, expected, rtol=0, atol=FLOAT32)
        assert found.sigma == pytest.approx((sigma.mean(), sigma.mean() / 2), rel=FLOAT32)
        assert found.spread == pytest.approx((sigma.std(), sigma.std() / 2), rel=FLOAT32)
        profiles = [formula((1, 5), s, s).sum() for s in sigma], [formula((1, 5), s / 2, s / 2).sum() for s in sigma]
        assert found.extent == pytest.approx(tuple(np.mean(p) for p in profiles), rel=FLOAT32)
    (alone,) = masks(model).layers
    assert (alone.sigma, alone.spread) == ((1.0, 0.5), None)
    assert np.allclose(alone.mask, formula((5, 5), 1.0, 0.5), rtol=0, atol=FLOAT32)
    assert masks(model).about["dynamic masks"] == "of no image"


def test_layers_stand_in_their_stages():
    model = surgery.convert(timm.create_model("test_resnet"), surgery.GMConv())
    found = masks(model, name="r", about={"weights": "random"})
    assert found.name == "r"
    assert found.about["weights"] == "random"
    assert [x.dynamic for x in found.layers] == [True] + [False] * (len(found.layers) - 1)
    stages = {x.name: x.stage for x in found.layers}
    assert [stages[name] for name in ("conv1.0", "layer1.0.conv1", "layer4.0.conv1")] == [0, 1, 4]
    rows = found.rows()
    assert sum(int(row["layers"].split()[0]) for row in rows) == len(found.layers)
    assert rows[0] == {
        "model": "r", "stage": "1", "layers": "1 dynamic", "kernel": "3x3", "start": "5", "sigma x": "5",
        "sigma y": "5", "extent x": "2.96", "extent y": "2.96", "kept": "0.974",
    }  # fmt: skip
    other = surgery.convert(torchvision.models.squeezenet1_1(), surgery.GMConv(stem="static"))
    assert not any(x.dynamic for x in masks(other).layers)


def test_what_has_no_mask_says_what_to_do():
    with pytest.raises(ValueError, match=r"ResNet has no layer with a mask: convert it with widefield.GMConv"):
        masks(timm.create_model("test_resnet"))
    fused = surgery.reparameterize(nn.Sequential(GMConv2d(3, 3, 5)).eval(), torch.randn(1, 3, 9, 9))
    with pytest.raises(ValueError, match=r"reparameterization, masks are part of the weights"):
        masks(fused)
    dynamic = nn.Sequential(DynamicGMConv2d(3, 4, 5))
    with pytest.raises(ValueError, match="images is empty"):
        masks(dynamic, [])
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        masks(dynamic, torch.rand(1, 3, 8, 8), batch_size=0)
    dynamic.idle = DynamicGMConv2d(3, 4, 5)
    dynamic.forward = lambda x: dynamic[0](x)
    with pytest.raises(ValueError, match="idle saw no image"):
        masks(dynamic, torch.rand(1, 3, 8, 8))


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(reader(DynamicGMConv2d(3, 4, 5, padding=2), 1.0), nn.BatchNorm2d(4), GMConv2d(4, 4, 3))
    model.train()
    model[2].eval()
    model[2].sigma.requires_grad_(False)
    stored = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    for given in (torch.rand(3, 3, 8, 8), torch.rand(3, 4, 8, 8)):
        if given.shape[1] == 3:
            masks(model, given)
        else:
            with pytest.raises(ValueError, match="must be"):
                masks(model, given)
        assert [m.training for m in model.children()] == [True, True, False]
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["2.sigma"]
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())
        assert not any(m._forward_hooks for m in model.modules())
        torch.rand(3)  # as given was drawn
    torch.set_rng_state(random)
    masks(model, torch.ones(2, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), random)


def test_files_and_the_figure(tmp_path):
    model = nn.Sequential(
        reader(DynamicGMConv2d(3, 8, 7), 1.0), GMConv2d(8, 8, 3), GMConv2d(8, 8, 5, dilation=2), nn.Conv2d(8, 16, 1),
        GMConv2d(16, 16, 4),
    )  # fmt: skip
    result = masks(model, torch.rand(4, 3, 24, 24), name="small")
    found = json.loads(result.save(tmp_path / "m.json").read_text())["results"]["small"]
    assert found["kind"] == "Masks"
    assert found["layers"][0]["sigma"] == list(result.layers[0].sigma)
    assert np.allclose(found["layers"][0]["mask"], result.layers[0].mask)
    assert result.save(tmp_path / "m.png").stat().st_size > 10_000
    figure = type(result).draw({"small": result, "other": masks(GMConv2d(1, 1, 3))})
    maps = [axis for axis in figure.axes if axis.images]
    assert {axis.images[0].get_extent()[1] for axis in maps} == {4.5}  # 5 taps, 2 pixels apart: 9 pixels
    assert {axis.images[0].get_clim() for axis in maps} == {(0.0, 1.0)}
    assert [axis.get_title() for axis in maps] == [
        "stage 1: 1 layer", "stage 2: 2 layers", "stage 3: 1 layer", "stage 1: 1 layer"
    ]  # fmt: skip
    second = maps[1].images[0].get_array()[::2, ::2].filled(np.nan)  # pixels of odd kernels
    three, five = (result.layers[i].mask for i in (1, 2))
    assert second[4, 4] == pytest.approx(1)
    assert second[4, 5] == pytest.approx(three[1, 2])  # between two taps of the dilated one
    assert second[4, 8] == pytest.approx(five[2, 4])
    assert np.isnan(second[4, 7])
    sigmas, shares = figure.axes[-2:]
    assert sigmas.get_ylabel() == "sigma (taps)"
    assert list(shares.lines[0].get_ydata()) == [layer.share for layer in result.layers]
    assert [text.get_text() for text in shares.get_legend().get_texts()] == ["small", "other"]


def test_words_hold_the_shares_and_what_training_and_images_changed():
    narrow, same, wide = (GMConv2d(1, 1, 7, sigma=2.0) for _ in range(3))
    nn.init.constant_(narrow.sigma, 1.0)
    nn.init.constant_(wide.sigma, 9.0)
    three = masks(nn.Sequential(narrow, same, wide), name="net")
    least, most = (formula((7, 7), sigma, sigma).mean() for sigma in (1.0, 9.0))
    words = type(three).reading({"net": three})
    assert words == (
        f"net: 3 masks leave {least:.0%} (0) to {most:.0%} (2) of their kernels. Since the start of training 1 became "
        "narrower and 1 wider."
    )
    assert [layer.change for layer in three.layers] == pytest.approx(
        [least / formula((7, 7), 2, 2).mean(), 1.0, most / formula((7, 7), 2, 2).mean()]
    )
    alone = masks(same, name="one")
    share = formula((7, 7), 2, 2).mean()
    assert type(alone).reading({"a": three, "b": alone}) == (
        f"{words.replace('net', 'a')} b: the mask of the layer leaves {share:.0%} of the kernel. "
        "It is as wide as at the start of training."
    )
    assert "It is narrower than at the start" in masks(nn.Sequential(narrow)).summary()
    alike = masks(nn.Sequential(same, same.__class__(1, 1, 7, sigma=2.0)), name="two")
    assert "each of the 2 masks leaves 44% of its kernel. All are as wide as" in alike.summary()


def test_words_on_dynamic_masks_need_images():
    model = nn.Sequential(reader(DynamicGMConv2d(3, 4, 5, padding=2, sigma=1.0), 2.0), GMConv2d(4, 4, 3))
    levels = torch.tensor([0.1, 0.9])[:, None, None, None].expand(2, 3, 8, 8)
    assert "1 of 1 dynamic mask differs between images" in masks(model, levels).summary()
    assert "0 of 1 dynamic mask differs between images" in masks(model, levels[:1]).summary()
    assert "Without images, nothing is known of how 1 dynamic mask changes with them." in masks(model).summary()
