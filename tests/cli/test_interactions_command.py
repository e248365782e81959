import json

import pytest
from rich.console import Console

from widefield.cli import main
from widefield.train import DataSpec, ModelSpec, Recipe, train

OURS = "unireplknet_a{depths: [1, 1, 1, 1], widths: [8, 16, 24, 32]}"


def test_timms_torchvisions_and_ours_on_one_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = ["test_resnet", "torchvision:squeezenet1_1", OURS]
    sampling = ["--grid", "4", "--pairs", "2", "--contexts", "2", "--orders", "0", "0.5", "1", "--baseline", "mean"]
    assert main(["interactions", *models, "--count", "2", "--size", "64", *sampling, "--vector", "svg"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("66 forward passes at 64 pixels") == 3  # 2 * (1 + 2 pairs * 4 * (1 + 2 + 1) contexts)
    assert "0 of 14" in shown.out
    for suffix in ("png", "svg", "html"):
        assert (tmp_path / "analysis" / f"interactions.{suffix}").stat().st_size > 1000
    results = json.loads((tmp_path / "analysis" / "interactions.json").read_text())["results"]
    assert list(results) == models
    for result in results.values():
        assert result["orders"] == [0, 7, 14]
        assert result["contexts"] == [1, 2, 1]
        about = result["about"]
        assert (about["class"], about["weights"], about["baseline"], about["size"]) == (
            "predicted",
            "random",
            "mean",
            64,
        )
        assert about["source"] == "photographs"


def test_a_run_is_asked_about_the_true_classes_of_its_own_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = {"patch_size": 2, "depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8]}
    recipe = Recipe(
        name="tiny",
        model=ModelSpec("convnext_atto", args),
        data=DataSpec("digits", {"size": 32}),
        output=str(tmp_path),
        epochs=1,
        batch_size=721,
        workers=0,
    )
    train(recipe, console=Console(quiet=True))
    few = ["--count", "2", "--grid", "2", "--pairs", "1", "--contexts", "2", "--out", "o"]
    assert main(["interactions", "tiny", *few]) == 0
    found = json.loads((tmp_path / "o" / "interactions.json").read_text())["results"]["tiny"]
    assert found["about"]["class"] == "given"
    assert found["about"]["source"] == "digits"
    assert found["orders"] == [0, 1, 2]
    assert main(["interactions", "tiny", *few, "--images", "photographs"]) == 0
    found = json.loads((tmp_path / "o" / "interactions.json").read_text())["results"]["tiny"]
    assert found["about"]["class"] == "predicted"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "40"], "grid must be from 2 to 32; got 40"),
        (["--orders", "1.5"], "every entry of orders must be from 0.0 to 1; got 1.5"),
        (["--size", "8"], "give a grid of at most 8"),
    ],
)
def test_a_wrong_argument_is_one_line(words, message, capsys):
    assert main(["interactions", "test_resnet", *words]) == 1
    (*_, line) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("widefield interactions: ")
    assert message in line
