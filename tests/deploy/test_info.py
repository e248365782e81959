"""Metadata of an export: classes, normalization and size, in the JSON file next to it and in the file itself."""

import json
import shutil

import onnx
import pytest
import timm
import torch
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from widefield import deploy

NAMES = ("cat", "dog", "owl", "emu")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network(channels=3):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def alone(path, folder):
    """Load a file without its JSON file, with only the files that it needs to run."""
    folder.mkdir()
    for part in path.parent.iterdir():
        if part.suffix != ".json":
            shutil.copy(part, folder)
    return deploy.load(folder / path.name).info


@pytest.mark.parametrize("suffix", ["onnx", "pt2", "xml"])
def test_what_is_given_stands_in_the_file_and_beside_it(tmp_path, suffix):
    path = tmp_path / "there" / f"a.{suffix}"
    done = deploy.export(
        network(), path, torch.randn(2, 3, 12, 16), classes=NAMES, normalization=((0.5,) * 3, (0.25,) * 3)
    )
    told = json.loads((path.parent / f"a.{suffix}.json").read_text())
    assert told["classes"] == list(done.classes) == list(NAMES)
    assert told["input"]["mean"] == [0.5] * 3
    assert told["input"]["std"] == [0.25] * 3
    assert told["input"]["size"] == [12, 16]  # height, width: the graph accepts only this size
    expected = deploy.ModelInfo(NAMES, (0.5,) * 3, (0.25,) * 3, (12, 16))
    assert deploy.load(path).info == alone(path, tmp_path / "elsewhere") == expected


@pytest.mark.parametrize("suffix", ["onnx", "pt2", "xml"])
def test_what_is_not_known_is_null(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    deploy.export(network(), path, torch.randn(2, 3, 16, 16), dynamic=("batch", "size"))
    told = json.loads((tmp_path / f"a.{suffix}.json").read_text())
    assert told["classes"] is None
    assert {told["input"][name] for name in ("size", "mean", "std")} == {None}
    assert deploy.load(path).info == deploy.ModelInfo()


def test_eight_bits_say_the_same(tmp_path):
    x = torch.randn(4, 3, 12, 16)
    done = deploy.quantize(network(), tmp_path / "a.onnx", [x], classes=NAMES, normalization=IMAGENET)
    told = json.loads((tmp_path / "a.onnx.json").read_text())
    assert told["classes"] == list(done.classes) == list(NAMES)
    assert told["input"]["mean"] == list(IMAGENET[0])
    assert deploy.load(tmp_path / "a.onnx").info == deploy.ModelInfo(NAMES, *IMAGENET, (12, 16))


def test_metadata_that_other_runtimes_read(tmp_path):
    deploy.export(network(), tmp_path / "a.onnx", torch.randn(2, 3, 12, 16), classes=NAMES)
    found = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert found == {"classes": list(NAMES), "mean": None, "std": None, "size": [12, 16]}


def test_timm_says_normalization_and_size_but_no_names_of_a_new_head(tmp_path):
    model = timm.create_model("resnet10t", num_classes=4).eval()
    found = deploy.ModelInfo.of(model)
    assert found == deploy.ModelInfo(None, *IMAGENET, (176, 176))
    model.pretrained_cfg["label_names"] = NAMES
    assert deploy.ModelInfo.of(model).classes == NAMES
    model.reset_classifier(7)
    assert deploy.ModelInfo.of(model).classes is None
    assert deploy.ModelInfo.of(nn.Conv2d(3, 4, 3)) == deploy.ModelInfo()


def test_a_gray_model_has_no_normalization_of_colors(tmp_path):
    model = network(channels=1)
    model.pretrained_cfg = {"mean": IMAGENET[0], "std": IMAGENET[1]}
    deploy.export(model, tmp_path / "a.onnx", torch.randn(2, 1, 12, 12))
    assert deploy.load(tmp_path / "a.onnx").info.mean is None


def test_torchvisions_weights(tmp_path):
    weights = ResNet18_Weights.IMAGENET1K_V1
    info = deploy.ModelInfo.from_weights(weights)
    assert info.classes == tuple(weights.meta["categories"])
    assert (info.mean, info.std, info.size) == (*IMAGENET, (224, 224))
    detector = deploy.ModelInfo.from_weights(FasterRCNN_ResNet50_FPN_Weights.DEFAULT)
    assert (detector.mean, detector.std, detector.size) == (None, None, None)  # it normalizes its input itself
    with pytest.raises(TypeError, match=r"weights must be of torchvision.*got 'DEFAULT'"):
        deploy.ModelInfo.from_weights("DEFAULT")
    x = torch.randn(2, 3, 32, 32)
    done = deploy.export(resnet18().eval(), tmp_path / "a.onnx", x, info=info)
    assert done.classes[967] == "espresso"
    assert done.input["size"] == [32, 32]  # exported for these, independent of the training
    with pytest.raises(ValueError, match=r"a name for each of the model's 4 outputs; got 1000: tench"):
        deploy.export(network(), tmp_path / "b.onnx", x, info=info)


def test_names_that_do_not_fit_are_refused(tmp_path):
    x = torch.randn(2, 3, 12, 12)
    with pytest.raises(ValueError, match=r"a name for each of the model's 4 outputs; got 2: cat, dog\."):
        deploy.export(network(), tmp_path / "a.onnx", x, classes=NAMES[:2])
    for wrong in ("cats", (0, 1, 2, 3)):
        with pytest.raises(TypeError, match="classes must be names"):
            deploy.export(network(), tmp_path / "a.onnx", x, classes=wrong)
    with pytest.raises(TypeError, match=r"info must be a ModelInfo"):
        deploy.quantize(network(), tmp_path / "a.onnx", [x], info=ResNet18_Weights.DEFAULT)
    assert not list(tmp_path.iterdir())


def test_files_of_others_say_nothing(tmp_path):
    deploy.export(network(), tmp_path / "a.onnx", torch.randn(2, 3, 12, 12), classes=NAMES)
    model = onnx.load(tmp_path / "a.onnx")
    for props in ({}, {"classes": "cat,dog", "mean": "3"}, {"author": "somebody"}):
        onnx.helper.set_model_props(model, props)
        onnx.save(model, tmp_path / "b.onnx")
        assert deploy.load(tmp_path / "b.onnx").info == deploy.ModelInfo()
