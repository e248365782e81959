"""``widefield predict``."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from train.helpers import QUIET
from widefield import cli
from widefield.loading import load
from widefield.train import DataSpec, ModelSpec, Recipe, train

SEGMENTER = "torchvision:lraspp_mobilenet_v3_large{num_classes: 3}"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, shape in {"a.png": (40, 60, 3), "b.png": (30, 30, 3)}.items():
        Image.fromarray(generator.integers(256, size=shape, dtype=np.uint8)).save(folder / name)
    return folder


def test_a_classifier_writes_a_page_numbers_and_a_figure(photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes(b"\x89PNG")
    out = tmp_path / "out"
    words = ["predict", "test_resnet{num_classes: 7}", str(photos), "--size", "32", "--top", "2", "--out", str(out)]
    assert cli.main(words) == 3
    assert sorted(path.name for path in out.iterdir()) == ["overlays", "predict.html", "predict.json", "predict.png"]
    assert sorted(path.name for path in (out / "overlays").iterdir()) == ["a.png", "b.png"]
    stored = json.loads((out / "predict.json").read_text())
    assert [image["name"] for image in stored["images"]] == ["a.png", "b.png"]
    assert [len(image["classes"]) for image in stored["images"]] == [2, 2]
    shown = capsys.readouterr()
    assert "a.png" in shown.out
    assert "1 of 3 images could not be read:" in shown.err
    assert "broken.png" in shown.err
    assert "broken.png" in (out / "predict.html").read_text()


def test_a_run_names_the_classes_it_was_trained_on(photos, tmp_path):
    recipe = Recipe(
        name="tiny",
        model=ModelSpec("convnext_atto", {"patch_size": 2, "depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8]}),
        data=DataSpec("scales", {"count": 16, "size": 32}),
        output=str(tmp_path),
        epochs=1,
        batch_size=16,
        workers=0,
    )
    folder = train(recipe, console=QUIET).folder
    assert cli.main(["predict", str(folder), str(photos / "a.png"), "--out", str(tmp_path / "out")]) == 0
    (image,) = json.loads((tmp_path / "out/predict.json").read_text())["images"]
    assert image["classes"][0]["name"] in load(str(folder)).classes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test_resnet", "nowhere.jpg"], "there is no file or folder 'nowhere.jpg'"),
        (["test_resnt", "PHOTOS"], "Did you mean 'test_resnet'"),
        (["test_resnet", "PHOTOS", "--size", "0"], "size must be at least 1; got 0"),
        (["test_resnet", "PHOTOS", "--batch-size", "0"], "batch_size must be at least 1"),
    ],
)
def test_what_can_be_mended_is_one_line(words, message, photos, tmp_path, capsys):
    given = [str(photos) if word == "PHOTOS" else word for word in words]
    assert cli.main(["predict", *given, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("widefield predict: ")
    assert message in error
    assert error.count("\n") == 1


def test_images_of_which_none_can_be_read_fail(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"x")
    words = ["predict", "test_resnet{num_classes: 3}", str(tmp_path / "a.png"), "--size", "32"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 1
    assert "1 image could not be read:" in capsys.readouterr().err
    assert not re.search("<img", (tmp_path / "out/predict.html").read_text())
