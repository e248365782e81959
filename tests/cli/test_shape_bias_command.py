import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from documents import document
from widefield.cli import main
from widefield.data import Scales
from widefield.train import DataSpec, ModelSpec, Recipe, train

OURS = "unireplknet_a{depths: [1, 1, 1, 1], widths: [8, 16, 24, 32]}"


@pytest.fixture
def published(tmp_path):
    """Create a few generated images under the published names."""
    rng = np.random.default_rng(0)
    for name in ("cat7-elephant1", "cat1-dog2", "knife2-oven1", "truck3-truck1"):
        path = tmp_path / "images" / name.rstrip("0123456789").split("-")[0].rstrip("0123456789") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def test_models_of_imagenet_on_the_published_layout(published, tmp_path, capsys):
    models = ["test_resnet", "torchvision:squeezenet1_1", OURS]
    words = ["--images", str(published), "--size", "64", "--out", str(tmp_path / "o"), "--vector", "pdf"]
    assert main(["shape-bias", *models, *words]) == 0
    assert "knife" in capsys.readouterr().out
    for suffix in ("png", "pdf", "html"):
        assert (tmp_path / "o" / f"shape-bias.{suffix}").stat().st_size > 1000
    results = json.loads((tmp_path / "o" / "shape-bias.json").read_text())["results"]
    assert list(results) == models
    for result in results.values():
        assert sum(result["images"]) == 3
        assert result["left_out"] == 1
        assert len(result["classes"]) == 16
        assert (result["about"]["weights"], result["about"]["size"]) == ("random", 64)


def test_images_are_drawn_for_models_of_scales(tmp_path, capsys):
    words = ["--generate", "--per-pair", "1", "--size", "32", "--seed", "3", "--out", str(tmp_path), "--json"]
    assert main(["shape-bias", "test_convnext{num_classes: 8}", *words]) == 0
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert folder.name == "conflicts-32px-1-a-pair-seed-3"
    assert len(list(folder.glob("*/*.png"))) == 56
    (result,) = document(capsys.readouterr().out)["results"].values()
    assert [result] == list(json.loads((tmp_path / "shape-bias.json").read_text())["results"].values())
    assert sum(result["images"]) == 56
    assert result["classes"] == sorted(Scales.classes)
    assert result["about"]["choice"] == "of 8 classes"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test_resnet", "--images", "nowhere"], "no folder of images 'nowhere'"),
        (
            ["test_resnet", "--generate", "--size", "32"],
            "test_resnet with its 1000 outputs does not name: give a run of",
        ),
        (["test_resnet{num_classes: 8}", "--generate", "--size", "16"], "size must be at least 32; got 16"),
    ],
)
def test_a_wrong_argument_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["shape-bias", *words, "--per-pair", "1"]) == 1
    (*_, line) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("widefield shape-bias: ")
    assert message in line


def test_what_was_found_is_said(published, tmp_path, capsys):
    (published / "cat" / "notes.txt").touch()
    (published / ".ipynb_checkpoints").mkdir()
    assert main(["shape-bias", "test_resnet", "--images", str(published), "--size", "32", "--out", str(tmp_path)]) == 0
    found = capsys.readouterr().out.splitlines()[0]
    assert found.startswith(
        f"4 images in {published}, 3 classes; left out: 1 hidden ('{published}/.ipynb_checkpoints')"
    )
    assert f"1 not images by their ending, .txt ('{published}/cat/notes.txt')" in found


def test_a_run_keeps_its_own_classes(tmp_path, capsys):
    recipe = Recipe(
        name="run",
        model=ModelSpec("test_convnext"),
        data=DataSpec("digits", {"size": 32}),
        output=str(tmp_path),
        epochs=1,
        batch_size=1000,
        workers=0,
    )
    train(recipe, console=Console(quiet=True))
    assert main(["shape-bias", str(tmp_path / "run"), "--generate", "--per-pair", "1", "--out", str(tmp_path)]) == 1
    assert "crescent" in (error := capsys.readouterr().err)
    assert "which run with its 10 outputs does not name: give a run of `widefield train demo_scales`" in error


def test_images_must_come_from_somewhere_and_from_one_place():
    for words in ([], ["--images", "x", "--generate"]):
        with pytest.raises(SystemExit):
            main(["shape-bias", "test_resnet", *words])
