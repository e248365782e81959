"""Recipes for dense tasks start from OpenMMLab's files, in full or in part, converted or not."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tolerances import FLOAT32, NETWORK, close
from widefield import dense
from widefield.data import Skeleton
from widefield.tasks import Detection, PoseEstimation, Segmentation
from widefield.train import Recipe, build_model
from widefield.train.recipe import ConversionSpec, DataSpec, ModelSpec

ARGS = {"dims": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
HEAD = {"channels": 8, "auxiliary_channels": 8}


def published(folder: Path, classes: int = 3) -> tuple[dense.UPerNet, str]:
    """Return a segmenter with drawn weights, and its file in OpenMMLab's form."""
    model = dense.UPerNet(timm.create_model("convnext_atto", features_only=True, **ARGS), classes, **HEAD).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    dense.save_checkpoint(model, folder / "published.pth")
    return model, str(folder / "published.pth")


def started(pretrained: str, classes: int = 3, conversion: ConversionSpec | None = None) -> Any:
    recipe = Recipe("name", ModelSpec("convnext_atto", ARGS, pretrained), DataSpec("digits"), conversion=conversion)
    task = Segmentation([str(index) for index in range(classes)], head_args=HEAD)
    return build_model(recipe, task).eval()


IMAGES = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def test_a_whole_file_gives_its_logits(tmp_path: Path) -> None:
    model, path = published(tmp_path)
    close(started(path)(IMAGES), model(IMAGES), FLOAT32)


def test_a_conversion_keeps_the_function_of_the_file(tmp_path: Path) -> None:
    model, path = published(tmp_path)
    converted = started(path, conversion=ConversionSpec("large_kernel", None, {"kernel_sizes": 13}))
    assert any(conv.kernel_size == (13, 13) for conv in converted.modules() if isinstance(conv, torch.nn.Conv2d))
    close(converted(IMAGES), model(IMAGES), FLOAT32)


def test_another_number_of_classes_starts_the_classifiers_afresh(tmp_path: Path) -> None:
    model, path = published(tmp_path, classes=5)
    found = started(path)
    with torch.no_grad():
        maps = model.maps(IMAGES)
        close(found.decode_head.features(found.maps(IMAGES)), model.decode_head.features(maps), FLOAT32)
    assert found.decode_head.conv_seg.weight.std() < 0.02


def test_a_file_without_a_decode_head_gives_its_backbone(tmp_path: Path) -> None:
    model, path = published(tmp_path)
    content = torch.load(path, weights_only=True)
    weights = {key: value for key, value in content["state_dict"].items() if key.startswith("backbone.")}
    torch.save({"state_dict": weights | {"roi_head.mask_head.conv_logits.bias": torch.zeros(80)}}, path)
    found = started(path)
    with torch.no_grad():
        for one, other in zip(found.backbone(IMAGES), model.backbone(IMAGES), strict=True):
            close(one, other, FLOAT32)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    _, path = published(tmp_path)
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["backbone.norm1.bias"]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"model\.pretrained: .*does not fit this UPerNet: .*backbone\.norm1\.bias"):
        started(path)


# Detectors

BOX_HEAD = {"neck_channels": 8, "box_channels": 16}


def detector(folder: Path, classes: int = 3) -> tuple[dense.FasterRCNN, str]:
    """Return a detector with drawn weights, and its file in OpenMMLab's form."""
    model = dense.FasterRCNN(timm.create_model("convnext_atto", features_only=True, **ARGS), classes, **BOX_HEAD).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    dense.save_checkpoint(model, folder / "detector.pth")
    return model, str(folder / "detector.pth")


def started_detector(pretrained: str, classes: int = 3, conversion: ConversionSpec | None = None) -> Any:
    recipe = Recipe("name", ModelSpec("convnext_atto", ARGS, pretrained), DataSpec("digits"), conversion=conversion)
    return build_model(recipe, Detection([str(index) for index in range(classes)], head_args=BOX_HEAD)).eval()


def test_a_detector_starts_from_a_whole_file_converted_or_not(tmp_path: Path) -> None:
    model, path = detector(tmp_path)
    with torch.no_grad():
        expected = model(IMAGES)[0]
        assert len(expected.boxes) > 5
        for conversion in (None, ConversionSpec("large_kernel", None, {"kernel_sizes": 13})):
            found = started_detector(path, conversion=conversion)(IMAGES)[0]
            close(found.boxes, expected.boxes, NETWORK)
            close(found.scores, expected.scores, NETWORK)


def test_another_number_of_classes_starts_the_last_layers_of_a_detector_afresh(tmp_path: Path) -> None:
    model, path = detector(tmp_path, classes=5)
    found = started_detector(path)
    assert torch.equal(found.roi_head.bbox_head.shared_fcs[1].weight, model.roi_head.bbox_head.shared_fcs[1].weight)
    assert torch.equal(found.rpn_head.rpn_conv.weight, model.rpn_head.rpn_conv.weight)
    assert found.roi_head.bbox_head.fc_cls.weight.std() < 0.02


def test_a_detector_takes_the_backbone_of_a_segmenter(tmp_path: Path) -> None:
    model, path = published(tmp_path)
    found = started_detector(path)
    with torch.no_grad():
        for one, other in zip(found.backbone(IMAGES), model.backbone(IMAGES), strict=True):
            close(one, other, FLOAT32)


def test_another_detector_is_refused(tmp_path: Path) -> None:
    _, path = detector(tmp_path)
    recipe = Recipe("name", ModelSpec("convnext_atto", ARGS, path), DataSpec("digits"))
    with pytest.raises(ValueError, match=r"model\.pretrained: .*holds a FasterRCNN, the model is an FCOS"):
        build_model(recipe, Detection(["0", "1", "2"], model="fcos", head_args={"neck_channels": 64}))


# Pose models


SKELETON = Skeleton(("tip", "left", "right"), (0, 2, 1), (0.1, 0.1, 0.1))


def started_pose(pretrained: str) -> Any:
    recipe = Recipe("name", ModelSpec("convnext_atto", ARGS, pretrained), DataSpec("digits"))
    return build_model(recipe, PoseEstimation(SKELETON, (64, 48), channels=(8, 8, 8))).eval()


@pytest.mark.parametrize("names", [None, SKELETON.names, ("tip", "right", "left"), ("a", "b", "c", "d")])
def test_pose_models_start_from_files_with_the_same_key_points(names: tuple[str, ...] | None, tmp_path: Path) -> None:
    """With others, or in another order, the last layer starts afresh."""
    count = 3 if names is None else len(names)
    network = timm.create_model("convnext_atto", features_only=True, **ARGS)
    model = dense.HeatmapPose(network, count, channels=(8, 8, 8)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path / "published.pth"
    dense.save_checkpoint(model, path, pose=dense.PoseConvention(names), mmpose="0.x")
    found = started_pose(str(path))
    with torch.no_grad():
        (one,), (other,) = found.backbone(IMAGES), model.backbone(IMAGES)
        close(found.head.deconv_layers(one), model.head.deconv_layers(other), FLOAT32)
        fresh = names not in (None, SKELETON.names)
        assert (found.head.final_layer.weight.std() < 0.01) == fresh
        if not fresh:
            close(found(IMAGES), model(IMAGES), FLOAT32)


def test_pose_models_start_from_the_backbone_of_other_files(tmp_path: Path) -> None:
    model, path = published(tmp_path)
    found = started_pose(path)
    with torch.no_grad():
        close(found.backbone(IMAGES)[0], model.backbone(IMAGES)[3], FLOAT32)
