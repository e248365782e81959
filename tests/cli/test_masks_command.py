"""``widefield masks``: of a run with learned masks, and of other models with initial masks."""

import json

import pytest
from rich.console import Console

from widefield.cli import main
from widefield.train import ConversionSpec, DataSpec, ModelSpec, Recipe, train

OURS = "resnet20_cifar{depths: [1, 1], widths: [4, 8]}"


def test_a_run_that_learned_masks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    recipe = Recipe(
        name="gm",
        model=ModelSpec("resnet20_cifar", {"depths": [1, 1], "widths": [4, 8]}),
        conversion=ConversionSpec("gmconv"),
        data=DataSpec("digits", {"size": 16, "augment": False}),
        output=str(tmp_path),
        epochs=1,
        batch_size=360,
        workers=0,
    )
    run = train(recipe, console=Console(quiet=True)).folder
    assert main(["masks", str(run), "--count", "4", "--batch-size", "3", "--out", str(tmp_path)]) == 0
    assert "1 dynamic" in capsys.readouterr().out
    found = json.loads((tmp_path / "masks.json").read_text())["results"]["gm"]
    assert found["about"]["weights"].startswith("model, best (step ")
    assert found["about"]["source"] == "digits"
    assert found["about"]["dynamic masks"] == "mean over 4 images"
    stem, *body = found["layers"]
    assert stem["dynamic"]
    assert max(stem["spread"]) > 0
    assert {layer["start"] for layer in body} == {5.0}
    assert all(layer["sigma"] != [5.0, 5.0] for layer in body)


def test_models_of_all_kinds_as_training_starts(tmp_path):
    words = ["test_resnet", "torchvision:shufflenet_v2_x0_5", OURS]
    options = ["--convert", "--size", "64", "--count", "2", "--out", str(tmp_path)]
    assert main(["masks", *words, *options]) == 0
    results = json.loads((tmp_path / "masks.json").read_text())["results"]
    assert list(results) == words
    for result in results.values():
        assert result["about"]["masks"] == "untrained"
        assert {tuple(layer["sigma"]) for layer in result["layers"]} == {(5.0, 5.0)}
        assert max(result["layers"][0]["spread"]) == 0
    for suffix in ("png", "html"):
        assert (tmp_path / f"masks.{suffix}").stat().st_size > 10_000


@pytest.mark.parametrize("word", ["test_resnet", "torchvision:shufflenet_v2_x0_5"])
def test_models_without_masks_are_told_how_to_get_them(word, tmp_path, capsys):
    assert main(["masks", word, "--out", str(tmp_path)]) == 1
    assert "convert it with widefield.GMConv" in capsys.readouterr().err
