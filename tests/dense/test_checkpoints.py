"""Published files load into segmenters of every family, and segmenters are saved as such files."""

import json
import re

import pytest
import timm
import torch
from conformance import filled, image, same_numbers
from timm.models.convnext import checkpoint_filter_fn as convnext_filter
from timm.models.focalnet import checkpoint_filter_fn as focalnet_filter
from torch import nn

from dense.published_files import (
    FIXTURE_NAMES,
    FIXTURES,
    IMAGES,
    NARROW,
    backbone_of,
    focalnet,
    made_weights,
    network,
    official,
    same,
    saved,
    segmenter,
    write,
)
from widefield import MoRF, convert, dense, reparameterize
from widefield.nn import LargeKernelConv2d
from widefield.surgery import fuse_layers

# Names


@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_saved_names_are_the_official_ones(name, tmp_path):
    weights = backbone_of(saved(segmenter(name), tmp_path))
    expected = official(name)
    assert weights.keys() == expected.keys()
    for key, shape in expected.items():
        if not re.match(r"norm\d", key):
            assert weights[key].ndim == len(shape), key
            if weights[key].ndim == 4 and key.endswith("weight"):
                assert list(weights[key].shape[2:]) == shape[2:], key


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_saved_names_and_shapes_are_the_official_ones_at_full_width(name, tmp_path):
    weights = backbone_of(saved(dense.UPerNet(name, 5, channels=8, auxiliary_channels=8), tmp_path))
    expected = official(name)
    assert weights.keys() == expected.keys()
    for key, shape in expected.items():
        assert list(weights[key].shape) == shape or re.match(r"norm\d", key), key


def test_saved_names_are_those_of_a_whole_published_model(tmp_path):
    """Of a UPerNet on ConvNeXt-T with 150 classes, from mmsegmentation and the official backbone."""
    document = json.loads((FIXTURES / "dense" / "upernet_convnext_tiny.json").read_text())
    weights = saved(segmenter("convnext_tiny", 150), tmp_path)
    assert weights.keys() == document["state_dict"].keys()
    assert {key: value.ndim for key, value in weights.items()} == {
        key: len(shape) for key, shape in document["state_dict"].items()
    }


VARIANTS = (
    "van_b4", "moganet_large", "hornet_base_gf", "replknet_xl", "unireplknet_s", "slak_base", "internimage_s",
    "internimage_h", "internimage_g",
)  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_of_other_variants_has_a_published_name(name, tmp_path):
    narrow = {
        "internimage_s": {"groups": (1, 1, 1, 1)},
        "internimage_h": {"groups": (1, 1, 1, 1), "head_width": 16, "heads": 2, "hidden": 8},
        "internimage_g": {"groups": (1, 1, 1, 1), "head_width": 16, "heads": 2, "hidden": 8},
    }
    widths = (8, 16, 32, 64)
    body = timm.create_model(name, features_only=True, widths=widths, **narrow.get(name, {}))
    model = dense.UPerNet(body, 5, channels=8, auxiliary_channels=8)
    weights = backbone_of(saved(model, tmp_path))
    assert sum(value.numel() for value in weights.values()) == sum(
        value.numel() for value in model.backbone.state_dict().values()
    )
    if name == "replknet_xl":  # batch norms after the stages are part of the published stages
        assert {"stages.0.norm.running_var", "stages.3.norm.weight"} <= weights.keys()
        assert not any(key.startswith("norm") for key in weights)


# Loading


@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_a_published_file_loads_in_full_and_is_saved_as_it_was(name, tmp_path):
    file = made_weights(saved(segmenter(name), tmp_path))
    model = segmenter(name)
    report = dense.load_checkpoint(model, write(file, tmp_path / "published.pth"))
    assert set(report.loaded) == set(model.state_dict())
    assert report.fresh == report.skipped == ()
    assert same(saved(model, tmp_path), file)
    again = segmenter(name)
    dense.save_checkpoint(model, tmp_path / "again.safetensors")
    dense.load_checkpoint(again, tmp_path / "again.safetensors")
    assert same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", [*NARROW, "focalnet_tiny_srf"])
def test_features_are_those_of_the_official_weights(name, tmp_path):
    """The reference takes official classification weights in its own way: by timm's filters, or directly."""
    file = made_weights(saved(segmenter(name), tmp_path))
    model = segmenter(name, stage_norms="none")
    norms = {key: value for key, value in file.items() if re.match(r"backbone\.norm[0-3]\.", key)}
    if "van" in name or "moganet" in name:  # there, these belong to the network
        norms = {}
    dense.load_checkpoint(model, write({k: v for k, v in file.items() if k not in norms}, tmp_path / "file.pth"))
    reference = focalnet() if "focalnet" in name else timm.create_model(name, num_classes=5, **NARROW[name])
    weights = {key: value for key, value in backbone_of(file).items() if f"backbone.{key}" not in norms}
    if "convnext" in name:
        weights = convnext_filter(weights, reference)
    if "focalnet" in name:
        weights = focalnet_filter(weights, reference)
    missing, unknown = reference.load_state_dict(weights, strict=False)
    assert not unknown
    assert all(key.startswith(("norm.", "head", "conv_head.")) for key in missing)
    if "van" in name:
        for stage in range(1, 5):
            reference.get_submodule(f"norm{stage}").eps = 1e-5
    images = IMAGES[..., :64, :64] if "focalnet" in name else IMAGES  # elsewhere, its segmentation code pads maps
    with torch.no_grad():
        found = model.double().eval().backbone(images)
        expected = reference.double().eval().forward_intermediates(images, intermediates_only=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "fixture"), [("DeepLabV3Plus", "deeplabv3plus_head"), ("SemanticFPN", "semantic_fpn_head")]
)
def test_other_segmenters_are_saved_with_published_names_and_load(kind, fixture, tmp_path):
    def build():
        options = {"channels": 8, "auxiliary_channels": 8} if kind == "DeepLabV3Plus" else {"channels": 8}
        return getattr(dense, kind)(network("moganet_xtiny"), 19, **options)

    file = made_weights(saved(build(), tmp_path))
    published = json.loads((FIXTURES / "dense" / f"{fixture}.json").read_text())["state_dict"]
    assert {key for key in file if key.startswith("decode_head.")} == set(published)
    model = build()
    assert set(dense.load_checkpoint(model, write(file, tmp_path / "file.pth")).loaded) == set(model.state_dict())
    assert same(saved(model, tmp_path), file)


def test_convnext_files_of_mmpretrain_load_and_are_saved(tmp_path):
    official_names = made_weights(saved(segmenter("convnextv2_atto"), tmp_path))
    model = segmenter("convnextv2_atto")
    dense.load_checkpoint(model, write(official_names, tmp_path / "official.pth"))
    theirs = saved(model, tmp_path, names="mmpretrain")
    assert "backbone.stages.2.5.depthwise_conv.weight" in theirs
    assert "backbone.stages.2.5.pointwise_conv1.bias" in theirs
    assert theirs["backbone.stages.0.0.grn.gamma"].shape == (32,)
    assert not any("dwconv" in key or "pwconv" in key for key in theirs)
    again = segmenter("convnextv2_atto")
    dense.load_checkpoint(again, write(theirs, tmp_path / "mmpretrain.pth"))
    assert same(again.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="known for ConvNeXt only, not for VAN"):
        dense.save_checkpoint(segmenter("van_b0"), tmp_path / "van.pth", names="mmpretrain")


def test_pointwise_layers_may_be_matrices_or_kernels(tmp_path):
    """timm has both for ConvNeXt, and mmpretrain's ``linear_pw_conv=False`` stores kernels."""
    file = made_weights(saved(segmenter("convnext_tiny"), tmp_path))
    body = timm.create_model("convnext_tiny", features_only=True, conv_mlp=True, **NARROW["convnext_tiny"])
    model = dense.UPerNet(body, 5, channels=8, auxiliary_channels=8)
    dense.load_checkpoint(model, write(file, tmp_path / "file.pth"))
    assert same(saved(model, tmp_path), file)
    kernels = {
        key: value[..., None, None] if re.search(r"pwconv\d\.weight", key) else value for key, value in file.items()
    }
    other = segmenter("convnext_tiny")
    dense.load_checkpoint(other, write(kernels, tmp_path / "kernels.pth"))
    assert same(saved(other, tmp_path), file)


@pytest.mark.parametrize("name", ["convnext_tiny", "focalnet_tiny_srf", "van_b0"])
def test_whole_networks_load_like_networks_of_features(name, tmp_path):
    file = made_weights(saved(segmenter(name), tmp_path))
    whole = focalnet() if "focalnet" in name else timm.create_model(name, num_classes=5, **NARROW[name])
    model = dense.UPerNet(whole, 5, channels=8, auxiliary_channels=8)
    assert set(dense.load_checkpoint(model, write(file, tmp_path / "file.pth")).loaded) == set(model.state_dict())
    assert same(saved(model, tmp_path), file)


# Merged files


MERGED = {
    "unireplknet_a": lambda body: body.reparameterize_unireplknet(),
    "replknet_31b": lambda body: body.structural_reparam(),
}


def test_merged_kernels_of_slak_load(tmp_path):
    """Of its networks without decomposed kernels, which the official code can merge."""

    def build():
        body = timm.create_model("slak_tiny", features_only=True, decomposed=False, **NARROW["slak_tiny"])
        return dense.UPerNet(body, 5, channels=8, auxiliary_channels=8)

    trained = build().eval()
    fuse_layers(trained.backbone, select=lambda module: isinstance(module, LargeKernelConv2d))
    file = saved(trained, tmp_path)
    assert "backbone.stages.0.0.large_kernel.lkb_reparam.weight" in file
    model = build()
    assert dense.load_checkpoint(model, write(file, tmp_path / "file.pth")).merged
    assert same(saved(model, tmp_path), file)


@pytest.mark.parametrize("name", MERGED)
def test_merged_files_load(name, tmp_path):
    trained = segmenter(name)
    trained.load_state_dict(made_weights(trained.state_dict()))
    trained.double().eval()
    logits = trained(IMAGES)
    MERGED[name](trained.backbone.body["model"])
    file = saved(trained, tmp_path)
    expected = {f"backbone.{key}" for key in official(name, "merged")} | {
        key for key in file if not key.startswith("backbone.") or re.match(r"backbone\.norm\d", key)
    }
    assert file.keys() == expected
    model = segmenter(name).double().train()
    report = dense.load_checkpoint(model, write(file, tmp_path / "merged.pth"))
    assert report.merged
    assert "merged form" in str(report)
    assert model.training
    torch.testing.assert_close(model.eval()(IMAGES), logits, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="reparameterized and the file is not"):
        dense.load_checkpoint(model, write(saved(segmenter(name), tmp_path), tmp_path / "training.pth"))


# Parts


def test_the_backbone_alone_is_loaded_for_fine_tuning(tmp_path):
    file = made_weights(saved(segmenter("convnext_tiny", 150), tmp_path))
    model = segmenter("convnext_tiny", 19)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = dense.load_checkpoint(model, write(file, tmp_path / "file.pth"), parts="backbone")
    assert all(key.startswith("backbone.") for key in report.loaded)
    assert set(report.fresh) == {key for key in before if not key.startswith("backbone.")}
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in report.fresh)
    assert same(backbone_of(saved(model, tmp_path)), backbone_of(file))
    assert "weights of the model kept their values (decode_head" in str(report)


@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_classifiers_are_loaded_into_the_backbone_on_request(name, tmp_path):
    whole = {key: [4] for key in ("norm.weight", "norm.bias", "head.weight", "head.bias")}
    if name.startswith(("van", "moganet", "internimage")):
        whole = {"head.weight": [4], "head.bias": [4]}
    weights = {
        key.removeprefix("backbone."): value
        for key, value in saved(segmenter(name), tmp_path).items()
        if key.startswith("backbone.") and (name.startswith(("van", "mog")) or not re.match(r"backbone\.norm\d", key))
    }
    file = made_weights(weights | {key: torch.zeros(4) for key in whole})
    path = tmp_path / "classifier.pth"
    torch.save({"model": file, "optimizer": {"state": {}}}, path)
    model = segmenter(name)
    with pytest.raises(ValueError, match="a classifier or a backbone alone; parts='backbone' loads"):
        dense.load_checkpoint(model, path)
    report = dense.load_checkpoint(model, path, parts="backbone")
    assert set(report.skipped) == set(whole)
    assert {key for key in report.fresh if key.startswith("backbone.")} == {
        key for key in model.state_dict() if re.match(r"backbone\.norm\d", key)
    }
    found = backbone_of(saved(model, tmp_path))
    assert all(torch.equal(found[key], file[key]) for key in weights)


def test_another_number_of_classes_needs_a_fresh_classifier(tmp_path):
    path = write(made_weights(saved(segmenter("van_b0", 150), tmp_path)), tmp_path / "file.pth")
    model = segmenter("van_b0", 19)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"150 classes, the model 19: .*fresh_classifier=True"):
        dense.load_checkpoint(model, path)
    assert same(model.state_dict(), before)
    report = dense.load_checkpoint(model, path, fresh_classifier=True)
    classifiers = {
        f"{head}.conv_seg.{part}" for head in ("decode_head", "auxiliary_head") for part in ("weight", "bias")
    }
    assert set(report.fresh) == set(report.skipped) == classifiers
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in classifiers)


def test_models_without_an_auxiliary_head_load_the_other_parts(tmp_path):
    file = made_weights(saved(segmenter("van_b0"), tmp_path))
    model = segmenter("van_b0", auxiliary=False)
    path = write(file, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"Only the file has an auxiliary head.*parts=\('backbone', 'decode_head'\)"):
        dense.load_checkpoint(model, path)
    report = dense.load_checkpoint(model, path, parts=("backbone", "decode_head"))
    assert set(report.loaded) == set(model.state_dict())
    assert all(key.startswith("auxiliary_head.") for key in report.skipped)


# Other networks


def test_networks_of_unknown_families_are_named_as_mmsegmentations_timm_backbone_does(tmp_path):
    model = dense.UPerNet("efficientnet_b0", 5, channels=8, auxiliary_channels=8)
    weights = saved(model, tmp_path)
    inner = timm.create_model("efficientnet_b0", features_only=True, out_indices=(1, 2, 3, 4)).state_dict()
    assert {f"timm_model.{key}" for key in inner} == set(backbone_of(weights))
    file = made_weights(weights)
    dense.load_checkpoint(model, write(file, tmp_path / "file.pth"))
    assert same(saved(model, tmp_path), file)


def test_known_families_written_with_mmsegmentations_timm_backbone_load(tmp_path):
    inner = network("convnext_tiny").state_dict()
    file = made_weights({f"backbone.timm_model.{key}": value for key, value in inner.items()})
    model = segmenter("convnext_tiny", stage_norms="none")
    file |= {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    dense.load_checkpoint(model, write(file, tmp_path / "file.pth"))
    assert all(torch.equal(model.backbone.body.state_dict()[key], file[f"backbone.timm_model.{key}"]) for key in inner)


def test_encoders_of_segmentation_models_pytorch_have_the_published_names_of_timms_networks(tmp_path):
    smp = pytest.importorskip("segmentation_models_pytorch")
    encoder = smp.encoders.get_encoder("tu-convnext_atto", weights=None)
    weights = saved(dense.UPerNet(encoder, 5, channels=8, auxiliary_channels=8), tmp_path)
    model = dense.UPerNet("convnext_atto", 5, channels=8, auxiliary_channels=8)
    file = made_weights(weights)
    assert set(dense.load_checkpoint(model, write(file, tmp_path / "file.pth")).loaded) == set(model.state_dict())
    assert same(saved(model, tmp_path), file)


def test_wrapped_models_load_and_are_saved(tmp_path):
    file = made_weights(saved(segmenter("van_b0"), tmp_path))
    model = segmenter("van_b0")
    wrapped = nn.DataParallel(model)
    dense.load_checkpoint(wrapped, write(file, tmp_path / "file.pth"))
    assert same(saved(wrapped, tmp_path), file)


def test_converted_models_load_before_the_conversion_and_are_not_saved(tmp_path):
    file = made_weights(saved(segmenter("convnext_tiny"), tmp_path))
    path = write(file, tmp_path / "file.pth")
    model = segmenter("convnext_tiny").eval()
    dense.load_checkpoint(model, path)
    converted = convert(model, MoRF((3, 7)))
    with pytest.raises(ValueError, match=r"layers that the file cannot know .*conv_dw.*load the file before convert"):
        dense.load_checkpoint(converted, path)
    with pytest.raises(ValueError, match=r"the published code of ConvNeXt lacks .*conv_dw"):
        dense.save_checkpoint(converted, tmp_path / "converted.pth")
    assert not (tmp_path / "converted.pth").exists()


def test_reparameterized_models_without_a_published_form_are_not_saved(tmp_path):
    model = segmenter("van_b0").eval()
    fused = reparameterize(model, torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="the published code of VAN lacks"):
        dense.save_checkpoint(fused, tmp_path / "fused.pth")


class Published(nn.Module):
    """Stands for a network with these published keys and shapes, for :func:`conformance.filled`."""

    def __init__(self, shapes):
        super().__init__()
        self.weights = {key: torch.zeros(shape) for key, shape in shapes.items()}

    def state_dict(self):
        return dict(self.weights)

    def load_state_dict(self, state):
        self.weights = state


@pytest.mark.slow
def test_a_published_model_gives_its_published_logits(tmp_path):
    """The UPerNet on ConvNeXt-T of the fixture, with 60M weights, through a file."""
    document = json.loads((FIXTURES / "dense" / "upernet_convnext_tiny.json").read_text())
    path = write(filled(Published(document["state_dict"])).weights, tmp_path / "upernet.pth")
    model = dense.UPerNet("convnext_tiny", 150)
    dense.load_checkpoint(model, path)
    expected = document["runs"][0]["upsampled_logits"]
    with torch.no_grad():
        logits = model.double().eval()(image(document["runs"][0]["size"]))
    same_numbers(logits.norm(), expected["l2"])
    same_numbers(logits.flatten()[: len(expected["first"])], expected["first"])
