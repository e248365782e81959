"""Recipes of segmentation start from OpenMMLab's files, in full or in part, with or without a conversion."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tolerances import FLOAT32, close
from widefield import dense
from widefield.tasks import Segmentation
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
