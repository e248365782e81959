"""Class activation maps: Grad-CAM against a plain reference, known results, and the right layer in every family."""

import json

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.mlp_mixer import MlpMixer
from torch import nn
from torchvision.models.resnet import BasicBlock

import widefield  # noqa: F401
from tolerances import FLOAT32, close
from widefield.analysis import save
from widefield.analysis._cam_layer import target_layer
from widefield.analysis.cam import ClassActivation, class_activation


def tiny(classes=5):
    """Return two convolutions, with an in-place module after the second."""
    features = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.GELU(), nn.Conv2d(6, 8, 3, 2, 1))
    return nn.Sequential(features, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def oracle(model, layer, images, target, places):
    """Compute Grad-CAM for each image by the paper's equations 1 and 2; ``places`` makes (h, w, C) of an output."""
    maps, kept = [], {}
    handle = model.get_submodule(layer).register_forward_hook(lambda m, args, output: kept.update(map=output.clone()))
    for image in images:
        with torch.no_grad():
            model(image[None])
        leaf = kept["map"].requires_grad_()
        replaced = model.get_submodule(layer).register_forward_hook(lambda m, args, output, leaf=leaf: leaf.clone())
        scores = model(image[None])[0]
        replaced.remove()
        k = scores.argmax() if target is None else target
        (gradient,) = torch.autograd.grad(scores[k], leaf)
        weights = places(gradient[0]).mean((0, 1))
        found = torch.einsum("hwc,c->hw", places(leaf[0].detach()), weights).relu()
        maps.append(found / found.max() if found.max() > 0 else found)
    handle.remove()
    return torch.stack(maps)


@pytest.mark.parametrize("target", [None, 3])
def test_maps_are_those_of_the_paper(target):
    model, images = tiny().double().eval(), torch.randn(4, 3, 20, 12, dtype=torch.float64)
    found = class_activation(model, images, targets=target, layer="0", batch_size=3)
    expected = oracle(model, "0", images, target, lambda x: x.movedim(0, -1))
    assert found.maps.shape == (4, 5, 3)
    assert found.maps.dtype == np.float32
    close(torch.from_numpy(found.maps), expected, FLOAT32)
    with torch.no_grad():
        scores = model(images)
    assert found.predicted.tolist() == scores.argmax(1).tolist()
    assert found.targets.tolist() == (scores.argmax(1).tolist() if target is None else [target] * 4)
    close(torch.from_numpy(found.probability), scores.softmax(1)[range(4), found.targets].float(), FLOAT32)


@pytest.mark.parametrize(
    ("name", "layer", "places"),
    [
        ("test_vit", "blocks.5.norm1", lambda x: x[1:].reshape(5, 5, -1)),  # tokens after a class token
        ("swin", "layers.0", lambda x: x),  # channels last
    ],
)
def test_tokens_and_channels_last_maps_are_maps(name, layer, places):
    model = make(name).double().eval()
    images = torch.randn(2, 3, 80, 80, dtype=torch.float64)
    found = class_activation(model, images, targets=1, layer=layer)
    close(torch.from_numpy(found.maps), oracle(model, layer, images, 1, places), FLOAT32)


class Corner(nn.Module):
    """The score of class k is its own channel in quadrant k."""

    def __init__(self):
        super().__init__()
        self.seen = nn.Conv2d(4, 4, 1, bias=False)
        nn.init.eye_(self.seen.weight[:, :, 0, 0])

    def forward(self, x):
        x = self.seen(x)
        corners = x[..., :4, :4], x[..., :4, 4:], x[..., 4:, :4], x[..., 4:, 4:]
        return torch.stack([corner[:, k].mean((1, 2)) for k, corner in enumerate(corners)], 1)


@pytest.mark.parametrize("k", range(4))
def test_what_a_class_sees_in_one_quadrant_is_mapped_there(k):
    images = torch.zeros(4, 4, 8, 8)
    for c, (top, left) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        images[:, c, top : top + 4, left : left + 4] = 1  # every image has content in each quadrant
    found = class_activation(Corner(), images, targets=k)
    expected = np.zeros((8, 8))
    expected[4 * (k // 2) :, 4 * (k % 2) :][:4, :4] = 1
    assert found.layer == "seen"
    assert np.array_equal(found.maps, np.stack([expected] * 4))
    assert found.area == pytest.approx([0.25] * 4)
    assert found.central == pytest.approx([0.25] * 4)
    each = class_activation(Corner(), images, targets=[0, 1, 2, 3])
    assert np.array_equal(each.maps[k], expected)


def test_width_and_center_are_measured_at_the_images_size():
    model = nn.Sequential(nn.AvgPool2d(8), nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(16, 1))
    nn.init.ones_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    nn.init.ones_(model[3].weight)
    image = torch.zeros(3, 1, 32, 32)
    image[0] = 1  # even
    image[1, :, 8:24, 8:24] = 1  # in the middle half of both sides
    found = class_activation(model, image, layer="1")
    assert found.size == (32, 32)
    upsampled = found.upsampled()
    assert upsampled.shape == (3, 32, 32)
    close(
        torch.from_numpy(upsampled),
        nn.Upsample((32, 32), mode="bilinear")(torch.from_numpy(found.maps)[:, None])[:, 0],
        FLOAT32,
    )
    assert found.area[:2] == pytest.approx([1, 0.25], abs=0.03)  # the interpolated corners are round
    assert found.central[:2] == pytest.approx([0.25, upsampled[1, 8:24, 8:24].sum() / upsampled[1].sum()])
    assert np.isnan([found.area[2], found.central[2]]).all()
    assert found.empty == 1
    assert found.rows()[0]["empty"] == "1 of 3"
    assert found.probability == pytest.approx(1 / (1 + np.exp(-model(image).detach().numpy()[:, 0])))
    json.dumps(found.to_dict(), allow_nan=False)


SMALL = {"num_classes": 5}
MAKE = {
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=80,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(1, 2),
        window_size=5,
        **SMALL,
    ),
    "deit": lambda: timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=80, depth=2, embed_dim=24, num_heads=2, **SMALL
    ),
    "vit with norms of queries and keys": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=80, depth=2, embed_dim=24, num_heads=2, qk_norm=True, **SMALL
    ),
    "cait": lambda: timm.create_model("cait_xxs24_224", img_size=80, depth=1, embed_dim=24, num_heads=2, **SMALL),
    "mixer": lambda: MlpMixer(img_size=80, num_blocks=2, embed_dim=24, **SMALL),
    "test_vit3": lambda: timm.create_model("test_vit3", img_size=80, **SMALL),
    "tv resnet": lambda: torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], **SMALL),
    "tv vit": lambda: torchvision.models.VisionTransformer(80, 16, 2, 2, 16, 32, **SMALL),
    "tv swin": lambda: torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [5, 5], **SMALL),
    "tv squeezenet": lambda: torchvision.models.squeezenet1_1(**SMALL),
    "replknet": lambda: timm.create_model(
        "replknet_31b", depths=(1, 1, 1, 1), widths=(8, 8, 16, 16), kernel_sizes=(7, 7, 5, 5), **SMALL
    ),
    "unireplknet": lambda: timm.create_model("unireplknet_a", depths=(1, 1, 1, 1), widths=(8, 16, 24, 32), **SMALL),
    "moganet": lambda: timm.create_model("moganet_xtiny", depths=(1, 1, 1, 1), widths=(16, 16, 32, 32), **SMALL),
    "morf": lambda: timm.create_model("morf_convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), **SMALL),
    "plain": tiny,
    "vgg": lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU()), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(196, 5)
    ),
}


def make(name):
    return MAKE[name]() if name in MAKE else timm.create_model(name, **SMALL)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("test_resnet", "layer4"),
        ("test_convnext", "stages"),
        ("test_efficientnet", "bn2"),
        ("test_nfnet", "final_act"),
        ("test_vit", "blocks.5.norm1"),  # uses a class token: other tokens of the last block have no effect
        ("test_vit3", "norm"),  # pools its tokens
        ("swin", "norm"),
        ("deit", "blocks.1.norm1"),
        ("vit with norms of queries and keys", "blocks.1.norm1"),
        ("cait", "blocks_token_only.1.norm1"),
        ("mixer", "norm"),
        ("tv resnet", "layer4"),
        ("tv vit", "encoder.layers.encoder_layer_1.ln_1"),
        ("tv swin", "norm"),
        ("tv squeezenet", "classifier.2"),
        ("replknet", "norm"),
        ("unireplknet", "stages.3"),
        ("moganet", "norm4"),
        ("morf", "stages"),
        ("plain", "1"),
        ("vgg", "0"),
    ],
)
def test_the_layer_is_the_last_map_that_the_class_hears_of(name, layer):
    model, image = make(name).eval(), torch.randn(1, 3, 80, 80)
    assert target_layer(model, image) == layer
    found = class_activation(model, image)
    assert (found.layer, found.about["layer"]) == (layer, layer)
    assert found.maps.shape[1] == found.maps.shape[2] > 1
    # timm's mixers and torchvision's ViT start with zero heads: a layer is found, but its map is empty.
    assert found.empty == (name in ("mixer", "tv vit"))


def state(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("name", ["plain", "tv vit"])
def test_the_model_and_the_images_are_left_as_they_were(name):
    model, images = make(name).train(), torch.randn(3, 3, 80, 80)
    next(model.modules()).training = True
    next(model.parameters()).requires_grad_(False)
    list(model.parameters())[-1].grad = torch.ones(5)
    stored = {k: v.clone() for k, v in model.state_dict().items()}
    before, seen = state(model), images.clone()
    found = class_activation(model, images)
    with pytest.raises(ValueError, match="classes from 0 to 4; got 5"):
        class_activation(model, images, targets=5)
    with pytest.raises(ValueError, match="returns no map"):
        class_activation(model, images, layer=list(dict(model.named_modules()))[-1])
    with torch.no_grad():  # its surroundings do not matter either
        assert np.array_equal(class_activation(model, images).maps, found.maps)
    assert state(model) == before
    assert all(torch.equal(v, stored[k]) for k, v in model.state_dict().items())
    assert torch.equal(images, seen)
    assert not images.requires_grad


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 7), batch=st.integers(1, 8), cut=st.integers(0, 6), seed=st.integers(0, 99))
def test_chunks_do_not_matter(count, batch, cut, seed):
    torch.manual_seed(seed)
    model, images = tiny().double(), torch.randn(count, 3, 16, 16, dtype=torch.float64)
    targets = torch.randint(5, (count,))
    whole = class_activation(model, images, targets=targets, layer="0", batch_size=count)
    loader = [{"image": part} for part in (images[:cut], images[cut:]) if len(part)]
    parts = class_activation(model, loader, targets=targets.tolist(), layer="0", batch_size=batch)
    close(torch.from_numpy(parts.maps), torch.from_numpy(whole.maps), FLOAT32)
    assert parts.targets.tolist() == targets.tolist()
    assert parts.about == whole.about


class Two(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"model": nn.Flatten(2)}, ValueError, r"Flatten must return scores \(N, classes\).*; got shape .*3, 256"),
        ({"model": nn.Conv2d(3, 5, 1)}, ValueError, "no layer that returns a map"),
        ({"model": Two()}, ValueError, "Two must return scores .* got tuple"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(768, 5))}, ValueError, "no layer that returns a map"),
        ({"targets": 5}, ValueError, "targets must be classes from 0 to 4; got 5"),
        ({"targets": -1}, ValueError, "targets must be at least 0; got -1"),
        ({"targets": "cat"}, TypeError, "targets must be an integer; got 'cat'"),
        ({"targets": [1]}, ValueError, "targets has 1 entries for 2 images"),
        ({"targets": [1, 2, 3]}, ValueError, "targets has 3 entries for 2 images"),
        ({"layer": "00"}, ValueError, "no layer '00'"),
        ({"layer": "4"}, ValueError, r"'4' returns no map of images of \(16, 16\) pixels: got shape \(2, 5\)"),
        ({"classes": ["a", "b"]}, ValueError, "classes has 2 names, but the model returns 5 scores"),
        ({"pixels": torch.rand(3, 16, 16, 3)}, ValueError, "pixels has 3 entries for 2 images"),
        ({"pixels": torch.randn(2, 16, 16, 3)}, ValueError, r"pixels must lie in \[0, 1\]; got -"),
        ({"pixels": torch.ones(2, 16, 16)}, ValueError, r"pixels must be .* \(N, H, W, C\); got torch.float32 \(2, 16"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"images": torch.randn(3, 16, 16)}, ValueError, "N, C, H, W"),
        ({"images": []}, ValueError, "images is empty"),
        ({"images": [torch.randn(1, 3, 16, 16), torch.randn(1, 3, 8, 8)]}, ValueError, "one size; got .16, 16. and .8"),
        ({"images": torch.full((1, 3, 16, 16), torch.inf)}, ValueError, "must be finite"),
    ],
)
def test_errors_say_what_to_mend(given, error, message):
    given = {"model": tiny(), "images": torch.randn(2, 3, 16, 16), **given}
    with pytest.raises(error, match=message):
        class_activation(**given)


def test_too_few_targets_for_a_stream_of_images():
    stream = iter([torch.randn(2, 3, 16, 16)] * 2)
    with pytest.raises(ValueError, match="targets has 2 entries for 4 images or more"):
        class_activation(tiny(), stream, targets=[0, 1])
    assert class_activation(tiny(), [torch.randn(2, 3, 16, 16)] * 2, targets=[0, 1, 2, 3]).targets.tolist() == [
        0,
        1,
        2,
        3,
    ]


def test_results_are_named_kept_small_and_drawn(tmp_path):
    images = torch.rand(3, 3, 300, 200)
    results = {}
    for name in ("one", "a_network_with_a_rather_long_name{and: arguments, of: [1, 2, 3]}"):
        results[name] = class_activation(
            tiny(), images, classes=["a", "b", "c", "d", "an animal of unusual length"], targets=[0, 4, 2],
            pixels=images.movedim(1, -1), name=name, about={"source": "noise"},
        )  # fmt: skip
    one = results["one"]
    assert isinstance(one, ClassActivation)
    assert one.labels == ("a", "an animal of unusual length", "c")
    assert one.pixels.shape == (3, 224, 149, 3)
    assert one.pixels.mean() == pytest.approx(images.mean().item(), abs=1e-3)
    assert one.about == {"source": "noise", "images": 3, "size": [300, 200], "layer": "1", "method": "Grad-CAM",
                         "class": "given"}  # fmt: skip
    assert "pixels" not in one.to_dict()
    assert one.to_dict()["maps"] == one.maps.tolist()
    drawing = save(results, tmp_path / "x.svg", count=2).read_text()
    assert "an animal of unusual" in drawing
    assert "an animal of unusual length" not in drawing  # cropped to the width of its picture
    assert "a_network_with_a_" in drawing
    assert save({"one": one}, tmp_path / "x.html", count=1).stat().st_size > 10_000
    figure = ClassActivation.draw(results, count=2)
    assert len(figure.axes) == 2 * 3 + 1  # and the scale
    assert figure.get_size_inches()[0] <= 7
    shades = {tuple(image.get_clim()) for axis in figure.axes[:-1] for image in axis.images[1:]}
    assert shades == {(0.0, 1.0)}
    assert [mesh.get_alpha() for mesh in figure.axes[-1].collections if mesh.get_array() is not None] == [1]
    bare = class_activation(tiny(), images, targets=1)
    assert bare.pixels is None
    assert bare.labels == ("class 1",) * 3
    assert len(bare.plot().axes) == 3 + 1
    with pytest.raises(ValueError, match=r"same images; got \[2, 3\] images"):
        ClassActivation.draw({"one": one, "two": class_activation(tiny(), images[:2])})


def test_two_runs_agree_to_the_bit():
    torch.manual_seed(3)
    model, images = make("test_vit"), torch.randn(2, 3, 80, 80)
    first, second = (class_activation(model, images) for _ in range(2))
    assert np.array_equal(first.maps, second.maps)


def test_it_works_where_gradients_are_off():
    model, images = timm.create_model("test_resnet", num_classes=5), torch.randn(2, 3, 64, 64)
    expected = class_activation(model, images)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = class_activation(model, images.clone())
        assert found.layer == expected.layer
        assert (found.maps == expected.maps).all()
