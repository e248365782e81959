"""Analyses restore the model completely, and find the maps of any model."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import widefield  # noqa: F401
from widefield.analysis._model import as_map, chunks, last_maps, submodule, visited, watched


def state(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
    )


def test_everything_is_put_back_also_after_an_exception():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).train()
    model[1].eval()
    model[2].bias.requires_grad_(False)
    before, stored = state(model), {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.randn(2, 3, 8, 8, requires_grad=True)

    def look():
        with visited(model), watched({"0": model[0]}, lambda *_: None):
            assert not any(m.training for m in model.modules())
            model(images).sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert images.grad is not None
    assert state(model) == before
    assert all(torch.equal(v, stored[k]) for k, v in model.state_dict().items())


def test_images_come_in_any_form():
    model = nn.Linear(1, 1).double()
    images = torch.randn(5, 3, 4, 4)
    for given in (images, [images[:2], images[2:]], [{"image": images, "label": 1}], [(images, torch.zeros(5))]):
        parts = list(chunks(given, model, 2))
        assert max(map(len, parts)) <= 2
        assert torch.equal(torch.cat(parts), images.double())
    assert [len(part) for part in chunks([images, images], model)] == [5, 5]
    for wrong, error in (([], ValueError), (images[0], ValueError), (images.long(), TypeError), (["a"], TypeError)):
        with pytest.raises(error, match="image"):
            list(chunks(wrong, model))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("test_resnet", "layer4"),
        ("test_convnext", "norm_pre"),
        ("test_vit", "norm"),
        ("test_efficientnet", "bn2"),
        ("resnet20_cifar", "layer3"),
    ],
)
def test_the_last_map_of_timms_models(name, layer):
    model = timm.create_model(name, num_classes=3)
    images = torch.randn(1, 3, 160, 160)
    assert last_maps(model, images)[-1] == layer


def test_the_last_map_of_torchvisions_models():
    images = torch.randn(1, 3, 64, 64)
    assert last_maps(torchvision.models.resnet18(), images)[-1] == "layer4"
    swin = torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=5)
    assert last_maps(swin, images)[-1] == "permute"
    vit = torchvision.models.VisionTransformer(64, 16, 1, 2, 16, 32, num_classes=5)
    assert last_maps(vit, images)[-1] == "encoder"


@pytest.mark.parametrize(
    ("shape", "images", "expected"),
    [
        ((2, 6, 7, 7), (224, 224), (2, 6, 7, 7)),
        ((2, 7, 7, 6), (224, 224), (2, 6, 7, 7)),
        ((2, 7, 14, 6), (224, 448), (2, 6, 7, 14)),
        ((2, 50, 6), (224, 224), (2, 6, 7, 7)),
        ((2, 49, 6), (224, 224), (2, 6, 7, 7)),
        ((2, 98 + 2, 6), (224, 448), (2, 6, 7, 14)),
        ((2, 6, 1, 1), (224, 224), None),
        ((2, 6), (224, 224), None),
        ((2, 3, 6), (224, 224), None),
        ((2, 6, 8, 5), (97, 61), (2, 6, 8, 5)),
    ],
)
def test_maps_are_told_from_what_is_none(shape, images, expected):
    found = as_map(torch.randn(shape), images)
    assert (None if found is None else tuple(found.shape)) == expected


def test_tokens_keep_their_places():
    tokens = torch.arange(17.0).reshape(1, 17, 1)
    assert torch.equal(as_map(tokens, (64, 64))[0, 0], torch.arange(1.0, 17).reshape(4, 4))
    both = torch.arange(64.0).reshape(1, 4, 4, 4)
    assert torch.equal(as_map(both, (64, 64)), both)
    assert torch.equal(as_map(both, (64, 64), layout="NHWC"), both.movedim(-1, 1))
    assert as_map((both,), (64, 64)) is None


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no layer 'layer5'\. Did you mean 'layer4'"):
        submodule(torchvision.models.resnet18(), "layer5")
