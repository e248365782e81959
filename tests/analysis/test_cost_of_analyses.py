"""What analyses cost: how many images run through the model."""

import pytest
import timm
import torch
from torch import nn

from tolerances import FLOAT32, close
from widefield.analysis import class_activation, effective_receptive_field, interactions
from widefield.analysis.interactions import forward_passes

captum = pytest.importorskip("captum.attr")


def runs(model, work):
    """Return the sizes of the batches that a model runs on."""
    seen = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        work()
    finally:
        handle.remove()
    return seen


def convolutions():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 6, 3, 2, 1)),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    ).eval()


@pytest.mark.parametrize("layer", [None, "0"])
def test_a_field_runs_on_each_image_once_and_follows_one(layer):
    model, images = convolutions(), torch.randn(6, 3, 16, 16)
    found = runs(model, lambda: effective_receptive_field(model, images, layer=layer, batch_size=4))
    assert found == [4, 2, 1]


def test_a_layer_whose_channels_cancel_costs_a_look_at_one_image():
    model = timm.create_model("test_vit")  # its last norm is fresh, so its channels always sum to 0
    found = []
    model.patch_embed.register_forward_pre_hook(lambda module, args: found.append(len(args[0])))
    assert effective_receptive_field(model, torch.randn(3, 3, 160, 160)).layer == "blocks"
    assert found == [3, 1, 1]


def test_more_fresh_norms_than_maps_are_kept_are_passed_over_too():
    norms = [timm.layers.LayerNorm2d(6) for _ in range(20)]
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *norms)
    images = torch.randn(2, 3, 8, 8)
    assert effective_receptive_field(model, images).layer == "0"


def test_equal_images_give_the_field_of_one():
    """Their channel sums do not differ, which says nothing about the gradient."""
    model, image = convolutions(), torch.randn(1, 3, 16, 16)
    several = effective_receptive_field(model, image.expand(3, -1, -1, -1))
    alone = effective_receptive_field(model, image)
    assert several.layer == alone.layer
    close(torch.from_numpy(several.scores), torch.from_numpy(alone.scores), FLOAT32)


def test_an_activation_map_of_a_layer_takes_one_pass():
    model, images = convolutions(), torch.randn(6, 3, 16, 16)
    assert runs(model, lambda: class_activation(model, images, layer="0", batch_size=4)) == [4, 2]


@pytest.mark.parametrize("inplace", [False, True])
def test_activation_maps_are_captums(inplace):
    model, images = convolutions(), torch.randn(4, 3, 20, 12)
    model[1].inplace = inplace
    found = class_activation(model, images, targets=2, layer="0")
    expected = captum.LayerGradCam(model, model[0]).attribute(images, 2, relu_attributions=True)[:, 0].detach()
    peak = expected.amax((1, 2), keepdim=True)
    close(torch.from_numpy(found.maps), expected / torch.where(peak > 0, peak, 1), FLOAT32)


def test_masked_images_of_several_pairs_and_images_share_batches():
    model, images = convolutions(), torch.randn(3, 3, 16, 16)
    options = {"grid": 4, "pairs": 2, "contexts": 3, "orders": (0, 0.5, 1)}
    found = runs(model, lambda: interactions(model, images, batch_size=16, **options))
    assert sum(found) == forward_passes(3, **options)
    masked = sum(found) - 3
    assert sorted(found) == sorted([3, *[16] * (masked // 16), masked % 16])


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_do_not_change_interactions(batch_size):
    model, images = convolutions().double(), [torch.randn(2, 3, s, s, dtype=torch.float64) for s in (16, 20)]
    options = {"grid": 4, "pairs": 2, "contexts": 3, "orders": (0, 0.5, 1)}
    whole = interactions(model, images, batch_size=1000, **options)
    parts = interactions(model, images, batch_size=batch_size, **options)
    close(torch.from_numpy(parts.samples), torch.from_numpy(whole.samples), FLOAT32)
