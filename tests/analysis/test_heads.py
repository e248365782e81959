"""Models with necks and heads, video models, and all forms of output: the analyzed layer, and errors."""

import collections

import numpy as np
import pytest
import timm
import torch
import torchvision
from headed import Answers, Detector, UNet, shaken
from torch import nn

from tolerances import FLOAT32, FLOAT64, close
from widefield.analysis import (
    class_activation,
    effective_receptive_field,
    interactions,
    masks,
    routing_statistics,
    routing_weights,
    theoretical_receptive_field,
    translation_stability,
)
from widefield.nn import DynamicGMConv2d, MoRFConv2d


def small(name, **options):
    kind = {} if name in dir(torchvision.models.video) else {"weights_backbone": None}
    model = torchvision.models.get_model(name, weights=None, **kind, **options)
    for module in model.modules():
        if hasattr(module, "score_thresh"):  # scores of untrained detectors are low
            module.score_thresh = 0.0
    return shaken(model)


def without_scale(maps):
    peak = maps.amax((1, 2), keepdim=True)
    return maps / torch.where(peak > 0, peak, 1)


SMALL = {"min_size": 64, "max_size": 64}


@pytest.mark.parametrize(
    ("name", "options", "layer"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", {**SMALL, "box_detections_per_img": 3}, "backbone.body.16"),
        ("retinanet_resnet50_fpn", {**SMALL, "detections_per_img": 3, "topk_candidates": 3}, "backbone.body.layer4"),
        ("ssdlite320_mobilenet_v3_large", {"topk_candidates": 3}, "backbone.features.1"),
        ("lraspp_mobilenet_v3_large", {}, "backbone.16"),
        ("fcn_resnet50", {"num_classes": 3}, "backbone"),
    ],
)
def test_torchvisions_models_are_looked_at_where_their_backbone_ends(name, options, layer):
    model, images = small(name, **options), torch.rand(2, 3, 64, 64)
    field = effective_receptive_field(model, images)
    assert field.layer == layer
    assert field.scores.shape == (64, 64)
    assert field.theoretical == theoretical_receptive_field(model, images)
    seen = class_activation(model, images, targets=1, pixels=images.movedim(1, -1))
    # An SSD reads smaller objects from an earlier map.
    assert seen.layer == layer or (seen.layer, layer) == ("backbone.features.0", "backbone.features.1")
    assert seen.maps.shape[0] == 2
    assert seen.targets.tolist() == [1, 1]
    predicted = class_activation(model, images)
    assert (predicted.targets == predicted.predicted).all()
    assert (predicted.probability > 0).all()


@pytest.mark.parametrize(("name", "layer"), [("r3d_18", "layer4"), ("swin3d_t", "features.4")])
def test_video_models_take_clips(name, layer):
    model, clips = small(name, num_classes=4), torch.randn(2, 3, 4, 32, 32)
    field = effective_receptive_field(model, clips, batch_size=1)
    assert field.layer == layer
    assert field.scores.shape == (32, 32)
    assert (field.about["size"], field.about["frames"]) == (32, 4)
    seen = class_activation(model, clips)
    assert seen.layer == layer
    assert seen.size == (32, 32)
    assert seen.maps.shape == (2, 2, 2)
    assert seen.targets.tolist() == model(clips).argmax(1).tolist()


def test_fields_of_clips_are_those_of_their_convolutions():
    model = nn.Sequential(nn.Conv3d(1, 2, (3, 5, 3), padding=(1, 2, 1)), nn.MaxPool3d((1, 2, 2)), nn.Conv3d(2, 2, 3))
    clip = torch.randn(1, 1, 6, 24, 24)
    field = theoretical_receptive_field(model, clip)
    assert (field.size, field.jump, field.reason) == ((10, 8), (2, 2), None)
    for layer in model:
        if isinstance(layer, nn.Conv3d):
            nn.init.ones_(layer.weight)
    pulled = effective_receptive_field(model, clip)
    assert pulled.clipped == (10, 8)
    seen = np.argwhere(pulled.scores > 0)
    assert (np.ptp(seen, axis=0) + 1 <= field.size).all()
    assert theoretical_receptive_field(model, 24).size == field.size


@pytest.mark.parametrize("target", [None, 2])
def test_maps_of_a_segmentation_model_are_those_of_seg_grad_cam(target):
    model, images = shaken(UNet()).double(), torch.randn(3, 3, 16, 24, dtype=torch.float64)
    found = class_activation(model, images, targets=target, batch_size=2)
    assert found.layer == "encoder.layer2"
    expected, chosen, sure = [], [], []
    for image in images:
        maps = model.encoder(image[None])
        deepest = maps[-1].detach().requires_grad_()
        logits = model.segmentation_head(model.decoder([*maps[:-1], deepest]))[0]
        counts = logits.argmax(0).flatten().bincount(minlength=4)
        k = int(counts.argmax()) if target is None else target
        pixels = logits.argmax(0) == k
        pixels = pixels if pixels.any() else torch.ones_like(pixels)
        (gradient,) = torch.autograd.grad(logits[k][pixels].mean(), deepest)
        expected.append((gradient.mean((2, 3), keepdim=True) * deepest).sum(1)[0].relu().detach())
        chosen.append(k)
        sure.append(logits.softmax(0)[k][pixels].mean().item())
    close(torch.from_numpy(found.maps), without_scale(torch.stack(expected)).float(), FLOAT32)
    assert found.targets.tolist() == chosen
    assert found.probability == pytest.approx(sure, rel=FLOAT32)


def test_a_class_without_a_pixel_is_looked_for_everywhere_and_one_map_has_one_class():
    class Flat(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.encoder, self.bias = nn.Conv2d(1, len(bias), 1), nn.Parameter(torch.tensor(bias)[:, None, None])

        def forward(self, x):
            return {"out": self.encoder(x) + self.bias, "aux": x}

    images = torch.rand(2, 1, 8, 8)
    never = class_activation(Flat([100.0, -100.0]), images, targets=1)
    assert never.predicted.tolist() == [0, 0]
    assert never.probability == pytest.approx([0, 0])
    single = class_activation(Flat([5.0]), images, classes=["road"])
    assert single.labels == ("road", "road")
    assert (single.probability > 0.9).all()


def test_maps_of_a_detector_are_those_of_its_detections_of_the_class():
    model, images = shaken(Detector()).double(), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    found = class_activation(model, images, targets=3)
    assert found.layer == "backbone.body"
    expected, best = [], []
    for image in images:
        deepest = model.backbone["body"](image[None]).detach().requires_grad_()
        maps = model.backbone["fpn"](deepest)[0]
        scores = maps[0, :4, :4].mean().sigmoid(), maps[2, 4:, :4].mean().sigmoid()  # those with the label 3
        (gradient,) = torch.autograd.grad(sum(scores), deepest)
        expected.append((gradient.mean((2, 3), keepdim=True) * deepest).sum(1)[0].relu().detach())
        best.append(max(scores).item())
    close(torch.from_numpy(found.maps), without_scale(torch.stack(expected)).float(), FLOAT32)
    assert found.probability == pytest.approx(best, rel=FLOAT32)
    free = class_activation(model, images)
    assert free.targets.tolist() == free.predicted.tolist() == [3, 3, 3]  # two detections outrank one
    assert class_activation(model, images, classes=list("abcdef")).labels == ("d", "d", "d")
    with pytest.raises(ValueError, match="classes has 2 names, but the model returns 4 scores"):
        class_activation(model, images, classes=["a", "b"])


def test_where_nothing_is_detected_the_map_is_empty():
    model, images = shaken(Detector()), torch.randn(3, 3, 16, 16)
    scores = [found["scores"].max().item() for found in model(images)]
    model.threshold = sorted(scores)[1]  # does not change the image with the highest score
    surest = scores.index(max(scores))
    found = class_activation(model, images)
    assert [k >= 0 for k in found.targets.tolist()] == [i == surest for i in range(3)]
    assert found.labels.count("nothing detected") == 2
    assert found.empty == 2
    assert found.maps[surest].max() == 1
    found.plot()
    wanted = class_activation(model, images, targets=9)
    assert (wanted.empty, wanted.probability.tolist()) == (3, [0, 0, 0])
    model.threshold = 1.0
    with pytest.raises(ValueError, match="Detector detects nothing in these 3 images"):
        class_activation(model, images)
    assert class_activation(model, images, targets=1).empty == 3


FORMS = {
    "dict": lambda y, z: {"features": z, "logits": y},
    "mapping": lambda y, z: collections.OrderedDict(loss=None, logits=y, features=z),
    "named": collections.namedtuple("Outputs", ["logits", "aux"]),
    "alone": lambda y, z: (y, None),
}
LOOKS = {
    "cam": lambda m, x: class_activation(m, x).maps,
    "erf": lambda m, x: effective_receptive_field(m, x).scores,
    "stability": lambda m, x: translation_stability(m, x, shifts=[1]).change,
    "interactions": lambda m, x: interactions(m, x, grid=2, orders=[0, 1], pairs=1, contexts=2).lower,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_outputs_are_taken_where_it_is_obvious_which_one_is_meant(form, look):
    model, images = shaken(Answers(form)), torch.randn(2, 3, 12, 12)
    plain = Answers(lambda y, z: y).eval()
    plain.load_state_dict(model.state_dict())
    assert np.array_equal(look(model, images), look(plain, images))


@pytest.mark.parametrize("look", [LOOKS[k] for k in ("cam", "stability", "interactions")])
def test_other_outputs_are_refused_with_the_way_to_wrap_the_model(look):
    images = torch.randn(2, 3, 12, 12)
    with pytest.raises(ValueError, match=r"tuple with \[0\] \(.*forward is return self\.model\(images\)\[0\]\."):
        look(shaken(Answers(lambda y, z: (y, z))), images)
    with pytest.raises(ValueError, match=r"dict with \['scores'\].*self\.model\(images\)\['scores'\]"):
        look(shaken(Answers(lambda y, z: {"scores": y, "map": z})), images)


def test_a_layer_may_return_its_map_next_to_what_is_none():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x):
            y = self.conv(x)
            return {"tokens": y.flatten(2).transpose(1, 2), "size": tuple(y.shape[2:])}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.fc = Block(), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(self.block(x)["tokens"].mean(1))

    model, images = Model().eval(), torch.randn(2, 3, 8, 8)
    found, inner = (class_activation(model, images, layer=layer) for layer in ("block", "block.conv"))
    close(torch.from_numpy(found.maps), torch.from_numpy(inner.maps), FLOAT32)
    outer, core = (effective_receptive_field(model, images, layer=layer).scores for layer in ("block", "block.conv"))
    close(torch.from_numpy(outer), torch.from_numpy(core), FLOAT64)


BY_LAYER = [class_activation, effective_receptive_field, theoretical_receptive_field]


@pytest.mark.parametrize("look", BY_LAYER)
def test_layers_are_names_or_modules(look):
    model, images = shaken(UNet()), torch.randn(1, 3, 16, 16)
    assert repr(look(model, images, layer=model.encoder.layer1)) == repr(look(model, images, layer="encoder.layer1"))
    with pytest.raises(ValueError, match="this ReLU does not belong to UNet") as caught:
        look(model, images, layer=nn.ReLU())
    assert len(str(caught.value)) < 200
    for wrong in (["encoder.layer1"], [model.encoder], 3):
        with pytest.raises(TypeError, match="layer must be the name of one module, such as 'segmentation_head'"):
            look(model, images, layer=wrong)
    with pytest.raises(ValueError, match=r"Encoder with \[0\]|list with \[0\].*: choose a layer inside it"):
        look(model, images, layer="encoder")


@pytest.mark.parametrize("look", BY_LAYER)
def test_a_layer_that_does_not_run_in_evaluation_is_said_to(look):
    model = torchvision.models.GoogLeNet(num_classes=4, init_weights=False, blocks=None).eval()
    with pytest.raises(ValueError, match="layer 'aux1' of GoogLeNet is never called in evaluation mode"):
        look(model, torch.randn(1, 3, 64, 64), layer="aux1")


def test_a_layer_without_a_part_in_the_scores_is_said_to():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            self.unused(x)
            return self.fc(self.used(x).mean((2, 3)))

    images = torch.randn(1, 3, 8, 8)
    assert class_activation(Beside(), images).layer == "used"
    with pytest.raises(ValueError, match="layer 'unused' of Beside does not affect the scores"):
        class_activation(Beside(), images, layer="unused")


def test_a_size_stands_for_images_of_noise():
    model = nn.Sequential(nn.Conv2d(5, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)).double()
    field = effective_receptive_field(model, 20, about={"seed": 0})
    assert field.scores.shape == (20, 20)
    assert field.about == {
        "source": "noise", "seed": 0, "images": 8, "size": 20, "layer": "(output)", "unit": "(10, 10) of 20",
    }  # fmt: skip
    assert np.array_equal(field.scores, effective_receptive_field(model, 20).scores)
    assert effective_receptive_field(model, (16, 24)).scores.shape == (16, 24)
    for wrong, error in ((0, ValueError), (None, TypeError), ((1, 2, 3), ValueError)):
        for look in (effective_receptive_field, theoretical_receptive_field):
            with pytest.raises(error, match="images must be"):
                look(model, wrong)


def test_images_in_another_layout_are_refused_with_the_mend():
    model, images = shaken(Answers(lambda y, z: y)), torch.rand(2, 3, 16, 12)
    routed = nn.Sequential(MoRFConv2d(3, 3), nn.Conv2d(3, 3, 1))
    for look in (*LOOKS.values(), theoretical_receptive_field, lambda m, x: routing_weights(routed, x)):
        with pytest.raises(ValueError, match=r"look like \(N, H, W, C\): pass images.movedim\(-1, 1\)"):
            look(model, images.movedim(1, -1))
        with pytest.raises(TypeError, match=r"torch.uint8 tensor\. Divide by 255"):
            look(model, (images * 255).byte())


def test_images_in_another_layout_are_not_called_too_small():
    model, images = shaken(Answers(lambda y, z: y)), torch.rand(1, 64, 64, 3)
    for look in (interactions, translation_stability):
        with pytest.raises(ValueError, match=r"64.*3.*look like \(N, H, W, C\): pass images.movedim\(-1, 1\)"):
            look(model, images)


def test_images_of_another_kind_are_refused_in_words():
    model, images = shaken(Answers(lambda y, z: y)), torch.rand(1, 3, 16, 16)
    routed = nn.Sequential(MoRFConv2d(3, 3), nn.Conv2d(3, 3, 1))
    looks = effective_receptive_field, theoretical_receptive_field, lambda m, x: routing_statistics(routed, x)
    for look in looks:
        for wrong in (images.numpy(), None, 2.5):
            with pytest.raises(TypeError, match=r"images must be"):
                look(model, wrong)


@pytest.mark.parametrize("shape", [(2, 16, 12, 3), (2, 32, 24, 3), (2, 16, 12, 1), (2, 16, 12, 5), (2, 300, 225, 3)])
def test_pixels_may_be_of_any_scale_and_number_of_channels(shape):
    model, images = shaken(Answers(lambda y, z: y)), torch.rand(2, 3, 16, 12)
    found = class_activation(model, images, pixels=torch.rand(shape))
    assert found.pixels.shape[-1] == shape[-1]
    found.plot()


@pytest.mark.parametrize("sides", [(16, 12), (16, 16), (3, 3)])
def test_pixels_in_another_layout_are_refused_with_the_mend(sides):
    images = torch.rand(2, 3, *sides)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    if sides != (3, 3):  # ambiguous
        with pytest.raises(ValueError, match=r"got \(2, 3, .*look like \(N, C, H, W\): pass pixels.movedim\(1, -1\)"):
            class_activation(model, images, pixels=images)
    with pytest.raises(ValueError, match=r"torch.uint8 \(2, .*Pass pixels / 255"):
        class_activation(model, images, pixels=(images * 255).byte().movedim(1, -1))
    with pytest.raises(ValueError, match="with sides as those of the images"):
        class_activation(model, images, pixels=torch.rand(2, 40, 12, 3))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_refused_by_all(value):
    images = torch.rand(2, 3, 16, 16)
    images[1, 0, 3, 3] = value
    model = shaken(Answers(lambda y, z: y))
    routed, masked = MoRFConv2d(3, 3), DynamicGMConv2d(3, 3, 3)
    looks = [lambda look=look: look(model, images) for look in LOOKS.values()]
    looks += [lambda: theoretical_receptive_field(model, images[1:]), lambda: masks(masked, images)]
    looks += [lambda: routing_weights(routed, images), lambda: routing_statistics(routed, [images])]
    for look in looks:
        with pytest.raises(ValueError, match=r"images must be finite; image \d of \d in a batch holds nan or infinity"):
            look()


@pytest.mark.parametrize("encoder", ["resnet18", "tu-resnet18"])
def test_segmentation_models_pytorch(encoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model, images = shaken(smp.Unet(encoder, encoder_weights=None, classes=3)), torch.rand(1, 3, 64, 64)
    layer = f"encoder.{'model.' if encoder.startswith('tu') else ''}layer4"
    assert effective_receptive_field(model, images).layer == layer
    assert class_activation(model, images).layer == layer


def test_wrapped_and_headless_networks_are_looked_at_where_their_backbone_ends():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)

    images = torch.randn(1, 3, 64, 64)
    twice = Wrapper(Wrapper(timm.create_model("test_convnext")))
    assert effective_receptive_field(twice, images).layer.startswith("model.model.")
    assert class_activation(twice, images).layer.startswith("model.model.stages")
    headless = timm.create_model("test_resnet", features_only=True)
    assert effective_receptive_field(headless, images).layer == "layer4"
