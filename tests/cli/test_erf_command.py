"""``widefield erf``."""

import json

import pytest
from PIL import Image

from widefield import cli

MODELS = [
    "test_resnet",
    "torchvision:shufflenet_v2_x0_5",
    "unireplknet_a{depths: [1, 1, 1, 1], widths: [8, 16, 24, 32]}",
]


def test_models_of_all_kinds_at_several_sizes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["erf", *MODELS, "--size", "64", "96", "--count", "2", "--out", str(tmp_path), "--vector", "svg"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["erf.html", "erf.json", "erf.png", "erf.svg"]
    found = json.loads((tmp_path / "erf.json").read_text())["results"]
    assert list(found) == [f"{name}, {size} px" for name in MODELS for size in (64, 96)]
    for name, result in found.items():
        assert name.startswith(result["name"])
        assert max(map(max, result["scores"])) == 1
        about = result["about"]
        assert (about["images"], about["source"], about["weights"]) == (2, "photographs", "random")
        assert {"seed", "mean", "std", "size", "layer", "unit"} <= about.keys()
    assert found["test_resnet, 96 px"]["theoretical"]["size"] == [167, 167]
    ours = found[f"{MODELS[2]}, 64 px"]["theoretical"]
    assert ours["size"] is None
    assert "in stages.0.0.se may reach every place" in ours["reason"]
    assert "167" in printed
    assert "whole" in printed


def test_seeds_repeat_and_a_layer_can_be_named(tmp_path):
    def scores(folder, *more):
        words = ["erf", "test_resnet", "--size", "64", "--count", "1", "--linear", *more]
        assert cli.main([*words, "--out", str(tmp_path / folder)]) == 0
        (result,) = json.loads((tmp_path / folder / "erf.json").read_text())["results"].values()
        return result

    first = scores("a", "--layer", "layer2")
    assert first["layer"] == "layer2"
    assert first["about"]["unit"] == "(4, 4) of 8"
    assert scores("b", "--layer", "layer2")["scores"] == first["scores"]
    assert scores("c", "--layer", "layer2", "--seed", "1")["scores"] != first["scores"]


def test_what_was_found_is_said(tmp_path, capsys):
    for name in ("cat/a.png", "cat/._a.png", ".ipynb_checkpoints/a.png", "cat/notes.txt"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 70)).save(path, "png")
    words = ["erf", "test_resnet", "--size", "64", "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"1 of 1 image in {tmp_path / 'images'}, 1 class; left out: 2 hidden (")
    assert "1 not images by their ending, .txt (" in first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test_resnet", "--layer", "layer9"], "ResNet has no layer 'layer9'. Did you mean 'layer"),
        (["vit_tiny_patch16_224{depth: 1, embed_dim: 12}", "--size", "64"], r"cannot be run on images of (3, 64, 64)"),
        (["test_resnet", "--size", "0"], "--size must be at least 1; got 0"),
        (["no_such_model"], "no_such_model"),
    ],
)
def test_errors_are_one_line(words, message, tmp_path, capsys):
    assert cli.main(["erf", *words, "--count", "1", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("widefield erf: ")
    assert message in printed
    assert printed.count("\n") == 1


SEGMENTER = "torchvision:lraspp_mobilenet_v3_large{num_classes: 3}"


def test_the_field_of_a_class_logit_at_a_pixel(tmp_path, capsys):
    def found(folder, *more):
        words = ["erf", SEGMENTER, "--size", "64", "--count", "1", *more, "--out", str(tmp_path / folder)]
        assert cli.main(words) == 0
        (result,) = json.loads((tmp_path / folder / "erf.json").read_text())["results"].values()
        return result

    center = found("a", "--pixel")
    assert center["about"]["of"] == "largest class at pixel (32, 32)"
    assert found("b", "--class", "1")["about"]["of"] == "class 1 at pixel (32, 32)"
    assert found("c", "--class", "1", "--pixel", "3", "60")["position"] == [3, 60]
    assert found("d", "--region", "0", "0", "9", "20")["position"] == [4, 9]
    capsys.readouterr()
    assert cli.main(["erf", SEGMENTER, "--size", "64", "--class", "bus", "--out", str(tmp_path)]) == 1
    assert "has no class 'bus'. Its classes have no names: give an index." in capsys.readouterr().err
    assert cli.main(["erf", SEGMENTER, "--size", "64", "--pixel", "3", "--out", str(tmp_path)]) == 1
    assert "--pixel takes ROW COLUMN, or nothing for the center; got [3]" in capsys.readouterr().err
