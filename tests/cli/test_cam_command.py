"""``widefield cam``: models of timm, torchvision and widefield in one figure, and a run with class names."""

import json

import pytest
from PIL import Image

from widefield import cli

OURS = "unireplknet_a{depths: [1, 1, 1, 1], widths: [8, 16, 24, 32]}"
MODELS = ["test_resnet", "torchvision:mobilenet_v3_small", OURS]


def test_models_are_shown_side_by_side(tmp_path, capsys):
    words = [
        "--count",
        "2",
        "--size",
        "64",
        "--batch-size",
        "1",
        "--target",
        "7",
        "--vector",
        "svg",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(["cam", *MODELS, *words]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cam.html", "cam.json", "cam.png", "cam.svg"]
    stored = json.loads((tmp_path / "cam.json").read_text())["results"]
    assert list(stored) == MODELS
    assert [found["layer"] for found in stored.values()] == ["layer4", "features", "stages.3"]
    for name, found in stored.items():
        assert found["name"] == name
        assert found["targets"] == [7, 7]
        assert len(found["maps"]) == 2
        assert found["about"]["source"] == "photographs"
        assert found["about"]["weights"] == "random"
        assert found["about"]["size"] == 64
    assert "class 7" in (tmp_path / "cam.svg").read_text()
    assert "layer4" in capsys.readouterr().out


def test_images_of_ones_own_and_a_layer_of_choice(tmp_path):
    for k in range(3):
        Image.new("RGB", (70, 50), (80 * k, 30, 90)).save(tmp_path / f"{k}.png")
    words = ["--images", str(tmp_path), "--size", "64", "--layer", "layer3", "--out", str(tmp_path / "out")]
    assert cli.main(["cam", "test_resnet", *words]) == 0
    (found,) = json.loads((tmp_path / "out/cam.json").read_text())["results"].values()
    assert found["layer"] == "layer3"
    assert len(found["maps"]) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test_resnet", "--target", "1000"], "targets must be classes from 0 to 999; got 1000"),
        (["test_resnet", "--layer", "layer5"], "no layer 'layer5'. Did you mean 'layer4'?"),
        (["test_resnett"], "test_resnett"),
        (["test_resnet", "--images", "nowhere"], "nowhere"),
    ],
)
def test_what_can_be_mended_is_one_line(words, message, tmp_path, capsys):
    assert cli.main(["cam", *words, "--size", "64", "--count", "1", "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["cam", "stability", "interactions", "erf"])
def test_a_size_that_a_model_refuses_is_one_line(command, tmp_path, capsys):
    assert cli.main([command, "test_vit", "--size", "50", "--count", "1", "--out", str(tmp_path)]) == 1
    assert "cannot be run on images of (3, 5" in capsys.readouterr().err
