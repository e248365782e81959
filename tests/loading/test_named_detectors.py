"""torchvision's detectors by name: classes, weights, and what they expect of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.models import detection, get_model_weights

from widefield import cli
from widefield.dense import FCOS, MaskRCNN
from widefield.loading import load
from widefield.loading.torchvision_detectors import build_detector, coco_categories

NAME = "fcos_resnet50_fpn"


def test_the_classes_are_the_80_categories_of_coco() -> None:
    names = coco_categories(NAME)
    assert len(names) == len(set(names)) == 80
    assert (names[0], names[-1]) == ("person", "toothbrush")
    assert not {"N/A", "__background__"} & set(names)


def test_published_weights_are_loaded_with_their_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    theirs = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None)
    published: Any = get_model_weights(NAME).DEFAULT
    monkeypatch.setattr(type(published), "get_state_dict", lambda self, *args, **options: theirs.state_dict())
    subject = load(f"torchvision:{NAME}", pretrained=True)
    assert isinstance(subject.model, FCOS)
    assert subject.class_names == coco_categories(NAME)
    assert len(subject.palette) == subject.outputs == 80
    weight = theirs.state_dict()["head.classification_head.cls_logits.weight"]
    assert torch.equal(subject.model.bbox_head.conv_cls.weight[0], weight[1])  # person, without the background
    norms = [m for m in subject.model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {0.0}


def test_images_are_prepared_as_torchvision_does() -> None:
    """The same pixels up to the rounding of sizes, without antialiasing."""
    subject = load("torchvision:maskrcnn_resnet50_fpn{num_classes: 3, neck_channels: 16, box_channels: 8}")
    assert isinstance(subject.model, MaskRCNN)
    assert subject.classes == ()
    assert subject.task().masks  # type: ignore[attr-defined]
    pixels = np.random.default_rng(0).integers(256, size=(100, 150, 3), dtype=np.uint8)
    found = subject.prepare()(Image.fromarray(pixels))
    transform = torchvision.models.detection.transform.GeneralizedRCNNTransform(800, 1333, subject.mean, subject.std)
    expected = transform([torch.from_numpy(pixels).movedim(-1, 0) / 255])[0].tensors[0]
    assert found.shape == (3, 800, 1200)
    torch.testing.assert_close(found, expected[:, :800, :1200], atol=2e-2, rtol=0)  # ours are rounded to whole pixels


def test_predict_takes_them_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    word = "torchvision:retinanet_resnet50_fpn{num_classes: 3, neck_channels: 16, num_convs: 1}"
    words = ["predict", word, str(tmp_path / "a.png"), "--size", "64", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert "has random weights; --pretrained" in capsys.readouterr().err
    assert (tmp_path / "out/predict_coco.json").is_file()


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn_v2", "ssd300_vgg16"])
def test_others_are_refused_with_the_names_of_those_that_can_be_built(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} cannot be built here.*There are fasterrcnn_resnet50_fpn, "):
        load(f"torchvision:{name}")
    with pytest.raises(TypeError):
        build_detector(NAME, {"depth": 3}, pretrained=False)
