"""``widefield stability``: models of timm, torchvision and widefield in one figure."""

import json

import numpy as np
import pytest

from train.helpers import QUIET
from widefield import cli
from widefield.runs.report import write_report
from widefield.train import DataSpec, ModelSpec, Recipe, train

OURS = "unireplknet_a{depths: [1, 1, 1, 1], widths: [8, 16, 24, 32]}"
MODELS = ["test_vit{img_size: 64}", "torchvision:mobilenet_v3_small", OURS]


def test_models_see_windows_of_larger_images(tmp_path, capsys):
    words = ["--count", "3", "--size", "64", "--batch-size", "2", "--shifts", "16", "1", "--vector", "pdf"]
    assert cli.main(["stability", *MODELS, *words, "--out", str(tmp_path)]) == 0
    names = ["stability.html", "stability.json", "stability.pdf", "stability.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    stored = json.loads((tmp_path / "stability.json").read_text())["results"]
    assert list(stored) == MODELS
    for name, found in stored.items():
        assert found["name"] == name
        assert found["shifts"] == [1, 16]
        assert found["about"]["size"] == 80
        assert found["about"]["window"] == 64
        assert found["about"]["images"] == 3
        assert found["about"]["weights"] == "random"
        assert [len(found["change"]), len(found["change"][0]), len(found["change"][0][0])] == [3, 2, 3]
    assert "cosine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test_resnet", "--shifts", "0"], "every entry of shifts must be at least 1; got 0"),
        (["test_resnet", "--shifts", "2", "2"], "got (2, 2)"),
        (["test_resnet", "--batch-size", "0"], "batch_size must be at least 1"),
    ],
)
def test_what_can_be_mended_is_one_line(words, message, tmp_path, capsys):
    assert cli.main(["stability", *words, "--size", "64", "--count", "1", "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_and_the_report_agree(tmp_path, capsys):
    recipe = Recipe(
        name="run", model=ModelSpec("test_resnet"), data=DataSpec("scales", {"count": 64, "size": 32}),
        output=str(tmp_path), epochs=1, batch_size=16, workers=0, trackers=[],
    )  # fmt: skip
    run = train(recipe, console=QUIET).folder
    assert cli.main(["stability", str(run), "--count", "4", "--out", str(tmp_path / "out")]) == 0
    (command,) = json.loads((tmp_path / "out" / "stability.json").read_text())["results"].values()
    write_report([run], tmp_path / "report.html", count=4)
    (report,) = json.loads((tmp_path / "report.json").read_text())["results"]["Translation stability"].values()
    assert command["shifts"] == report["shifts"] == [1, 2, 4]
    assert command["same"] == report["same"]
    np.testing.assert_allclose(command["change"], report["change"])
    assert "warning" not in capsys.readouterr().err
