"""Files that do not fit are refused with the first differences and the probable reason; the model is unchanged."""

import re

import pytest
import timm
import torch

from dense.published_files import NARROW, focalnet, made_weights, same, saved, segmenter, write
from widefield import dense

HEADS = {"channels": 8, "auxiliary_channels": 8}


def convnext_of(**options):
    return timm.create_model("convnext_tiny", features_only=True, **{**NARROW["convnext_tiny"], **options})


def refusal(model, path, **options):
    """Return the message of a refusal; check that nothing changed."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=r"does not fit this .*The model is unchanged") as caught:
        dense.load_checkpoint(model, path, **options)
    assert same(model.state_dict(), before)
    assert [module.training for module in model.modules()] == modes
    return str(caught.value)


@pytest.fixture(scope="module")
def convnext(tmp_path_factory):
    return made_weights(saved(segmenter("convnext_tiny"), tmp_path_factory.mktemp("convnext")))


def test_the_first_keys_of_each_kind_are_named(convnext, tmp_path):
    file = dict(convnext)
    for stage in range(4):
        del file[f"backbone.stages.{stage}.0.gamma"]
    file["backbone.stages.0.7.gamma"] = torch.zeros(8)
    file["decode_head.bottleneck.conv.weight"] = torch.zeros(8, 5, 3, 3)
    message = refusal(segmenter("convnext_tiny"), write(file, tmp_path / "file.pth"))
    assert "file.pth does not fit this UPerNet" in message
    assert (
        "not in the file: backbone.stages.0.0.gamma, backbone.stages.1.0.gamma, backbone.stages.2.0.gamma and 1 more"
        in (message)
    )
    assert "not in the model: backbone.stages.0.7.gamma" in message
    assert "other shapes: decode_head.bottleneck.conv.weight is (8, 5, 3, 3) and should be (8, 56, 3, 3)" in message


def test_one_weight_too_many_or_too_few_is_enough(convnext, tmp_path):
    for key in (
        "backbone.norm2.bias",
        "decode_head.fpn_convs.0.bn.num_batches_tracked",
        "auxiliary_head.conv_seg.bias",
    ):
        less = {name: value for name, value in convnext.items() if name != key}
        assert key in refusal(segmenter("convnext_tiny"), write(less, tmp_path / "less.pth"))
    more = convnext | {"decode_head.extra.weight": torch.zeros(1)}
    assert "decode_head.extra.weight" in refusal(segmenter("convnext_tiny"), write(more, tmp_path / "more.pth"))


def test_transposed_kernels_do_not_pass_for_matrices(convnext, tmp_path):
    key = "backbone.stages.0.0.pwconv1.weight"
    file = convnext | {key: convnext[key].T}
    assert "is (8, 32) and should be (32, 8)" in refusal(segmenter("convnext_tiny"), write(file, tmp_path / "file.pth"))


@pytest.mark.parametrize(
    ("build", "hint"),
    [
        (lambda: dense.SemanticFPN(convnext_of(), 5), "The file holds a UPerNet, the model is a SemanticFPN"),
        (lambda: segmenter("van_b0"), "The file's backbone is a ConvNeXt, the model's a VAN"),
        (lambda: dense.UPerNet("efficientnet_b0", 5, **HEADS), "The file's backbone is a ConvNeXt."),
        (
            lambda: dense.UPerNet(convnext_of(depths=(3, 3, 5, 3)), 5, **HEADS),
            r"another variant: its stages have \[3, 3, 9, 3\] blocks, the model's \[3, 3, 5, 3\]",
        ),
        (
            lambda: dense.UPerNet(convnext_of(dims=(16, 16, 16, 24)), 5, **HEADS),
            "another variant: it starts with 8 channels, the model's with 16",
        ),
        (lambda: segmenter("convnext_tiny", 7), "5 classes, the model 7: build the model with num_classes=5"),
        (lambda: segmenter("convnext_tiny", auxiliary=False), "Only the file has an auxiliary head.*auxiliary=True"),
        (
            lambda: segmenter("convnext_tiny", stage_norms="none"),
            "Only the norms after the backbone's stages differ.*'layer'",
        ),
        (
            lambda: dense.UPerNet(convnext_of(), 5, channels=16, auxiliary_channels=8),
            "build the model with channels=8",
        ),
    ],
)
def test_the_reason_is_given(convnext, build, hint, tmp_path):
    message = refusal(build(), write(convnext, tmp_path / "file.pth"))
    assert re.search(hint, message), message


@pytest.mark.parametrize(
    ("extra", "hint"),
    [
        ("roi_head.bbox_head.fc_cls.weight", "It is a detection file; parts='backbone' loads its backbone"),
        ("bbox_head.retina_cls.weight", "It is a detection file"),
        ("keypoint_head.final_layer.weight", "It is a pose file"),
        ("head.final_layer.weight", "It is a pose file"),
        ("head.fc.weight", "It holds a classifier or a backbone alone"),
    ],
)
def test_files_of_other_tasks_are_recognized_and_give_their_backbone(convnext, extra, hint, tmp_path):
    backbone = {key: value for key, value in convnext.items() if key.startswith("backbone.")}
    path = write(backbone | {extra: torch.zeros(2, 2)}, tmp_path / "file.pth")
    model = segmenter("convnext_tiny")
    assert hint in refusal(model, path)
    report = dense.load_checkpoint(model, path, parts="backbone")
    assert len(report.loaded) == len(backbone)
    assert report.skipped == (extra,)


def test_our_own_state_dicts_are_recognized(tmp_path):
    model = segmenter("convnext_tiny")
    torch.save(model.state_dict(), tmp_path / "own.pth")
    assert "widefield's own names: load it with model.load_state_dict" in refusal(model, tmp_path / "own.pth")


def test_models_without_an_auxiliary_head_that_are_too_few(convnext, tmp_path):
    file = {key: value for key, value in convnext.items() if not key.startswith("auxiliary_head.")}
    path = write(file, tmp_path / "file.pth")
    assert "Only the model has an auxiliary head" in refusal(segmenter("convnext_tiny"), path)
    assert dense.load_checkpoint(segmenter("convnext_tiny", auxiliary=False), path).fresh == ()


def test_other_focal_windows_are_explained(tmp_path):
    wide = dense.UPerNet(focalnet(9), 5, **HEADS)
    path = write(made_weights(saved(wide, tmp_path)), tmp_path / "file.pth")
    assert "build the backbone with them, such as focal_windows=(9, 9, 9, 9)" in refusal(
        segmenter("focalnet_tiny_srf"), path
    )
    dense.load_checkpoint(wide, path)


def test_other_global_filters_are_explained_and_the_mend_works(tmp_path):
    model = segmenter("hornet_tiny_gf")
    model.backbone.body["model"].set_input_size(384)
    path = write(made_weights(saved(model, tmp_path)), tmp_path / "file.pth")
    other = segmenter("hornet_tiny_gf")
    assert "call set_input_size(384)" in refusal(other, path)
    other.backbone.body["model"].set_input_size(384)
    dense.load_checkpoint(other, path)
    assert same(other.state_dict(), model.state_dict()) is False
    assert same(saved(other, tmp_path), torch.load(path, weights_only=True)["state_dict"])


def test_arguments_are_checked(convnext, tmp_path):
    path = write(convnext, tmp_path / "file.pth")
    model = segmenter("convnext_tiny")
    with pytest.raises(ValueError, match="one of 'backbone', 'decode_head', 'auxiliary_head'; got 'decoder'"):
        dense.load_checkpoint(model, path, parts="decoder")
    with pytest.raises(ValueError, match="parts is empty: give some of backbone"):
        dense.load_checkpoint(model, path, parts=())
    with pytest.raises(TypeError, match=r"model must be a segmenter.*got ConvNeXt.*create_model"):
        dense.load_checkpoint(timm.create_model("convnext_atto"), path)
    with pytest.raises(TypeError, match=r"no argument 'part'\. Did you mean 'parts'"):
        dense.load_checkpoint(model, path, part="backbone")
    with pytest.raises(ValueError, match="names must be one of 'published', 'mmpretrain'; got 'official'"):
        dense.save_checkpoint(model, path, names="official")
