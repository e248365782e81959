"""Backbones give the maps of the published segmentation code: VAN, ResNet, MobileNetV2, FocalNet."""

import pytest
import timm
import torch
import torchvision
from timm.layers import LayerNorm2d
from torch import nn

from dense.published_files import IMAGES, NARROW, backbone_of, focalnet, made_weights, same, saved, write
from tolerances import FLOAT32, close
from widefield import dense

# VAN


def van_segmentation(weights, images):
    """The feature maps of the published segmentation code, whose LayerNorms have PyTorch's default eps."""
    network = timm.create_model("van_b0", num_classes=0, **NARROW["van_b0"]).double().eval()
    network.load_state_dict(weights, strict=False)
    maps, x = [], images
    for stage in range(1, 5):
        x = network.get_submodule(f"block{stage}")(network.get_submodule(f"patch_embed{stage}")(x))
        norm = nn.LayerNorm(x.shape[1]).double()
        norm.load_state_dict(network.get_submodule(f"norm{stage}").state_dict())
        x = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        maps.append(x)
    return maps


@pytest.mark.parametrize(
    "build", [lambda: "van_b0", lambda: timm.create_model("van_b0", num_classes=5, **NARROW["van_b0"])]
)
def test_van_has_the_norms_of_its_segmentation_code(build, tmp_path):
    backbone = build()
    options = NARROW["van_b0"] if isinstance(backbone, str) else {}
    model = dense.UPerNet(backbone, 5, channels=8, auxiliary_channels=8, **options).double().eval()
    file = made_weights(saved(model, tmp_path))
    for key in file:
        if key.endswith("layer_scale_1") or key.endswith("layer_scale_2"):
            file[key] = file[key] * 1e-3  # small maps: their variance is near the eps
        if ".proj.weight" in key:
            file[key] = file[key] * 1e-3
    dense.load_checkpoint(model, write(file, tmp_path / "van.pth"))
    with torch.no_grad():
        found = model.backbone(IMAGES)
        expected = van_segmentation({key: value.double() for key, value in backbone_of(file).items()}, IMAGES)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    for module in model.backbone.modules():
        if isinstance(module, LayerNorm2d):
            module.eps = 1e-6
    with torch.no_grad():
        assert max((a - b).abs().max() for a, b in zip(model.backbone(IMAGES), expected, strict=True)) > 1e-7


# ResNet and MobileNetV2


def narrow_resnet(name, **options):
    return timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4), layers=(1, 2, 1, 1), **options)


def test_resnet_files_have_torchvisions_names(tmp_path):
    reference = torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], num_classes=5)
    weights = made_weights({k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")})
    model = dense.UPerNet(narrow_resnet("resnet50"), 5, channels=8, auxiliary_channels=8)
    heads = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    file = {f"backbone.{key}": value for key, value in weights.items()} | heads
    dense.load_checkpoint(model, write(file, tmp_path / "resnet.pth"))
    assert same(saved(model, tmp_path), {key: file[key] for key in saved(model, tmp_path)})
    reference.load_state_dict(weights, strict=False)
    body = torchvision.models._utils.IntermediateLayerGetter(
        reference.eval(), {f"layer{i}": str(i) for i in range(1, 5)}
    )
    images = IMAGES.float()
    with torch.no_grad():
        for one, other in zip(model.eval().backbone(images), body(images).values(), strict=True):
            torch.testing.assert_close(one, other)
    whole = dense.UPerNet(reference, 5, channels=8, auxiliary_channels=8)
    dense.load_checkpoint(whole, write(file, tmp_path / "resnet.pth"))
    assert saved(whole, tmp_path).keys() == file.keys()


class DeepStem(nn.Sequential):
    """The stem of mmsegmentation's ResNetV1c."""

    def __init__(self, width):
        parts = []
        for channels, outputs, stride in ((3, width // 2, 2), (width // 2, width // 2, 1), (width // 2, width, 1)):
            parts += [nn.Conv2d(channels, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*parts)


def test_resnet_v1c_has_a_deep_stem(tmp_path):
    model = dense.UPerNet(narrow_resnet("resnet50c"), 5, channels=8, auxiliary_channels=8)
    weights = made_weights(saved(model, tmp_path))
    stem = {key.removeprefix("stem."): value for key, value in backbone_of(weights).items() if key.startswith("stem.")}
    reference = DeepStem(64).eval()
    reference.load_state_dict(stem)
    dense.load_checkpoint(model, write(weights, tmp_path / "v1c.pth"))
    body = model.eval().backbone.body
    with torch.no_grad():
        found = body["act1"](body["bn1"](body["conv1"](IMAGES.float())))
        torch.testing.assert_close(found, reference(IMAGES.float()))


class InvertedResidual(nn.Module):
    """mmsegmentation's block of MobileNetV2, with its names."""

    def __init__(self, channels, outputs, stride, ratio, dilation):
        super().__init__()
        inner = channels * ratio
        self.shortcut = stride == 1 and channels == outputs
        layers = [] if ratio == 1 else [unit(channels, inner, 1)]
        depthwise = unit(inner, inner, 3, stride, inner, dilation)
        self.conv = nn.Sequential(*layers, depthwise, unit(inner, outputs, 1, act=False))

    def forward(self, x):
        y = self.conv(x)
        return x + y if self.shortcut else y


def unit(channels, outputs, size, stride=1, groups=1, dilation=1, act=True):
    parts = {"conv": nn.Conv2d(channels, outputs, size, stride, size // 2 * dilation, dilation, groups, bias=False),
             "bn": nn.BatchNorm2d(outputs)}  # fmt: skip
    sequence = nn.Sequential()
    for name, part in (parts | ({"activate": nn.ReLU6()} if act else {})).items():
        sequence.add_module(name, part)
    return sequence


class MobileNetV2(nn.Module):
    """mmsegmentation's MobileNetV2, with its names; a stage's dilation is that of its first block."""

    def __init__(self, strides, dilations):
        super().__init__()
        self.conv1 = unit(3, 32, 3, 2)
        settings = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
        channels = 32
        for index, (ratio, outputs, count) in enumerate(settings, 1):
            blocks = []
            for number in range(count):
                stride, dilation = (1, 1) if number else (strides[index - 1], dilations[index - 1])
                blocks.append(InvertedResidual(channels, outputs, stride, ratio, dilation))
                channels = outputs
            self.add_module(f"layer{index}", nn.Sequential(*blocks))

    def forward(self, x):
        x, maps = self.conv1(x), []
        for index in range(1, 8):
            x = self.get_submodule(f"layer{index}")(x)
            if index in (2, 3, 5, 7):
                maps.append(x)
        return maps


@pytest.mark.parametrize(
    ("stride", "strides", "dilations"),
    [(32, (1, 2, 2, 2, 1, 2, 1), (1,) * 7), (8, (1, 2, 2, 1, 1, 1, 1), (1, 1, 1, 2, 2, 4, 4))],
)
def test_mobilenetv2_files_load(stride, strides, dilations, tmp_path):
    """Also with the strides and dilations of the published DeepLabv3+ (output stride 8)."""
    reference = MobileNetV2(strides, dilations)
    weights = made_weights(reference.state_dict())
    reference.load_state_dict(weights)
    model = dense.DeepLabV3Plus("mobilenetv2_100", 19, channels=8, auxiliary_channels=8, output_stride=stride)
    file = made_weights(saved(model, tmp_path)) | {f"backbone.{key}": value for key, value in weights.items()}
    report = dense.load_checkpoint(model, write(file, tmp_path / "mobilenet.pth"))
    assert set(report.loaded) == set(model.state_dict())
    assert same(saved(model, tmp_path), {key: file[key] for key in saved(model, tmp_path)})
    with torch.no_grad():
        found = model.double().eval().backbone(IMAGES)
        for one, other in zip(found, reference.double().eval()(IMAGES), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# FocalNet


def test_focalnet_pads_maps_as_its_segmentation_code_does(tmp_path):
    network = focalnet().double().eval()
    model = dense.UPerNet(network, 5, stage_norms="none", channels=8, auxiliary_channels=8).double().eval()

    def padded(x, multiple):
        height, width = x.shape[2:]
        return nn.functional.pad(x, (0, -width % multiple, 0, -height % multiple))

    with torch.no_grad():
        x, expected = network.stem(padded(IMAGES, 4)), []
        for index, layer in enumerate(network.layers):
            x = layer(padded(x, 2) if index else x)
            expected.append(x)
        found = model.backbone(IMAGES)
    assert [tuple(x.shape[2:]) for x in found] == [(18, 23), (9, 12), (5, 6), (3, 3)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert model.backbone.body["model"].stem.proj is not network.stem.proj  # a whole classifier stays as it was
    assert type(network.stem.proj) is nn.Conv2d


def test_a_padded_focalnet_is_exported_for_any_size():
    model = dense.UPerNet(focalnet(), 5, channels=8, auxiliary_channels=8).eval()
    batch, height, width = (torch.export.Dim(name, min=least) for name, least in (("n", 1), ("h", 64), ("w", 64)))
    program = torch.export.export(
        model, (torch.zeros(2, 3, 96, 128),), dynamic_shapes=({0: batch, 2: height, 3: width},)
    )
    with torch.no_grad():
        images = IMAGES.float()
        close(program.module()(images), model(images), FLOAT32)


@pytest.mark.parametrize("small", [0, 3])
def test_large_kernels_of_mobilenetv2_are_dilated_like_its_small_ones(small):
    body = timm.create_model("mobilenetv2_lk", features_only=True, output_stride=8, kernel_sizes=9, small_kernel=small)
    model = dense.DeepLabV3Plus(body, 19, channels=8, auxiliary_channels=8, out_indices=(1, 2, 3, 4), output_stride=8)
    blocks = model.backbone.body.model.blocks
    for stage, dilation in enumerate((1, 1, 1, 2, 2, 4, 4)):
        for number, block in enumerate(blocks[stage]):
            expected = 1 if number else dilation
            found = [conv for conv in block.conv_dw.modules() if isinstance(conv, nn.Conv2d)]
            assert {conv.dilation for conv in found} == {(expected, expected)}
            assert all(conv.padding == tuple(expected * (k // 2) for k in conv.kernel_size) for conv in found)
    with torch.no_grad():
        assert [x.shape[2:] for x in model.eval().backbone(IMAGES.float())] == [(18, 23), *[(9, 12)] * 3]
