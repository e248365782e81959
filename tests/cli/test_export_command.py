"""``widefield export``: from a model's name or a run to files that onnxruntime runs."""

import json
import re

import pytest
import torch

from cli.test_segmentation_commands import made_set
from documents import document
from train.helpers import QUIET
from widefield import cli, deploy
from widefield.train import DataSpec, ModelSpec, Recipe, TaskSpec, train

SMALL = "{depths: [1, 1, 1, 1], dims: [8, 16, 24, 32], num_classes: 5}"


def export(*words):
    return cli.main(["export", *words])


def test_a_network_with_mixtures_all_the_way(tmp_path, capsys):
    words = ["--size", "32", "--count", "16", "--batch-size", "4", "--routing", "mean", "--trim", "--int8", "--out"]
    assert export(f"morf_convnext_tiny{SMALL}", *words, str(tmp_path)) == 0
    names = ["morf_convnext_tiny-int8.onnx", "morf_convnext_tiny-int8.onnx.json"]
    names += ["morf_convnext_tiny.onnx", "morf_convnext_tiny.onnx.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    told = json.loads((tmp_path / "morf_convnext_tiny.onnx.json").read_text())
    assert told["routing"] is None  # static
    assert told["operators"]["Conv"] == 8  # stem, three between stages, one per block
    assert [check["shape"][0] for check in told["checks"]] == [1, 3, 8, 4]
    assert deploy.load(tmp_path / "morf_convnext_tiny.onnx")(torch.zeros(7, 3, 32, 32)).shape == (7, 5)
    assert deploy.load(tmp_path / "morf_convnext_tiny-int8.onnx")(torch.zeros(7, 3, 32, 32)).shape == (7, 5)
    out = capsys.readouterr().out
    for words in (
        "specialized 4 of 4",
        "kernels cropped",
        "Only for images of 32x32 pixels",
        "as it came: outputs on 8",
    ):
        assert words in out


def test_the_file_of_a_run_names_its_classes(tmp_path, capsys):
    run = str(tmp_path / "runs" / "digits_morf")
    small = [
        "--epochs",
        "null",
        "--max_steps",
        "2",
        "--schedule.warmup_epochs",
        "0",
        "--model.args.dims",
        "[4, 8, 8, 8]",
    ]
    small += ["--model.args.depths", "[1, 1, 1, 1]", "--batch_size", "8", "--output", str(tmp_path / "runs")]
    assert cli.main(["train", "digits_morf", *small]) == 0
    words = ["--count", "16", "--batch-size", "4", "--int8", "--keep", "head.fc", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert export(run, *words, "--json") == 0
    told = document(capsys.readouterr().out)
    assert {"export", "int8", "change", "files"} <= set(told)
    written = told["files"]
    assert {str(path) for path in (tmp_path / "out").glob("*.onnx")} <= set(written)
    for path in sorted((tmp_path / "out").glob("*.onnx")):
        info = deploy.load(path).info
        assert info.classes == tuple(map(str, range(10)))
        told = json.loads((tmp_path / "out" / f"{path.name}.json").read_text())
        assert told["classes"] == list(info.classes)
        assert told["input"]["size"] == list(info.size) == told["input"]["shape"][2:]
        assert told["input"]["mean"] == list(info.mean)


@pytest.mark.parametrize("name", ["torchvision:vit_b_32{image_size: 64}", "vit_tiny_patch16_224{img_size: 64}"])
def test_a_size_that_the_network_does_not_take_is_refused(tmp_path, capsys, name):
    assert export(name, "--size", "96", "--count", "2", "--out", str(tmp_path)) == 1
    assert "cannot be run on images of (3, 96, 96)" in capsys.readouterr().err


def test_random_weights_have_no_names(tmp_path):
    assert export("resnet10t", "--size", "32", "--count", "4", "--out", str(tmp_path)) == 0
    assert json.loads((tmp_path / "resnet10t.onnx.json").read_text())["classes"] is None


@pytest.mark.parametrize("format", ["pt2", "openvino"])
def test_other_formats(tmp_path, capsys, format):
    words = ["--size", "32", "--count", "4", "--format", format, "--out", str(tmp_path)]
    assert export("resnet10t{num_classes: 5}", *words) == 0
    path = tmp_path / f"resnet10t{deploy.FORMATS[format]}"
    assert deploy.load(path)(torch.zeros(3, 3, 32, 32)).shape == (3, 5)
    assert "100 %" in capsys.readouterr().out


def test_a_fixed_batch_of_gray_images(tmp_path):
    words = ["--size", "32", "--count", "7", "--batch-size", "2", "--dynamic", "--out", str(tmp_path)]
    assert export("resnet10t{in_chans: 1, num_classes: 5}", *words) == 0
    told = json.loads((tmp_path / "resnet10t.onnx.json").read_text())
    assert told["input"]["shape"] == [2, 1, 32, 32]
    assert len(told["input"]["mean"]) == 1


@pytest.mark.slow
def test_a_segmentation_run_becomes_files_for_any_size(tmp_path, capsys):
    options = {"root": str(made_set(tmp_path / "shapes")), "classes": str(tmp_path / "shapes" / "classes.txt")}
    recipe = Recipe(
        name="shapes", model=ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),
        data=DataSpec("masks", {**options, "size": 64}),
        task=TaskSpec("segmentation", {"head_args": {"channels": 8}}),
        output=str(tmp_path / "runs"), epochs=None, max_steps=2, evaluate_every=2, batch_size=2, workers=0,
    )  # fmt: skip
    run = str(train(recipe, console=QUIET).folder)
    words = ["--count", "4", "--batch-size", "2", "--trim", "--int8", "--out", str(tmp_path / "out")]
    assert export(run, *words) == 0
    out = capsys.readouterr().out
    assert re.search(r"as it came: outputs on 2 images change by .* of pixels, mIoU \d+\.\d+% -> ", out)
    assert re.search(r"-int8\.onnx: .* of pixels, mIoU \d+\.\d+% -> ", out)
    assert "Only for images of" not in out
    told = json.loads((tmp_path / "out" / "shapes.onnx.json").read_text())
    assert told["classes"] == ["ground", "brick", "water"]
    assert told["input"]["dynamic"] == ["batch", "size"]
    assert told["checks"][-1]["miou_before"] is not None
    for name in ("shapes", "shapes-int8"):
        exported = deploy.load(tmp_path / "out" / f"{name}.onnx")
        assert exported(torch.zeros(3, 3, 75, 91)).shape == (3, 3, 75, 91)


def test_what_is_refused(tmp_path, capsys):
    words = ["--size", "32", "--count", "4", "--out", str(tmp_path / "new")]
    for more, told in (
        (["--int8", "--format", "pt2"], "8 bits are written as ONNX; got --format pt2"),
        (["--routing", "mean"], "has no routed layer"),
    ):
        assert export("resnet10t", *words, *more) == 1
        assert told in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    assert export("resnet10t", *words[:4], "--out", str(tmp_path / "file" / "folder")) == 1
    assert "file" in capsys.readouterr().err
