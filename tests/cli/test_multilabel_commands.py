"""The commands with a multi-label classifier: evaluation, prediction, report, export."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from widefield import cli, data
from widefield.loading import load
from widefield.predictions import predict
from widefield.tasks import LabelPrediction
from widefield.train import DataSpec, ModelSpec, OptimizerSpec, Recipe, TaskSpec, load_recipe, train

CLASSES = data.SceneLabels.classes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of two epochs on small scenes; tests leave it as it is."""
    recipe = Recipe(
        name="several",
        model=ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),
        data=DataSpec("scene_labels", {"count": 32, "size": 32}),
        task=TaskSpec("multilabel", {"threshold": 0.3}),
        output=str(tmp_path_factory.mktemp("runs")),
        optimizer=OptimizerSpec(lr=2e-3),
        epochs=1,
        batch_size=16,
        workers=0,
        trackers=[],
    )
    return train(recipe).folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a table of labels for its images."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    with (root / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "labels", "split"])
        for index in range(6):
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / f"{index}.png")
            labels = CLASSES if index == 5 else rng.permutation(CLASSES)[:index].tolist()
            table.writerow([f"{index}.png", ";".join(labels), "val"])
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: object) -> str:
        assert cli.main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return run


def test_eval_shows_each_class(folder: Path, printed: Callable[..., str], tmp_path: Path) -> None:
    text = printed("eval", folder, "--page", tmp_path / "page.html", "--examples", 2)
    for word in ("map", "cf1", "of1", "mAP ", "from a probability of 0.3", "AP", "F1", *CLASSES):
        assert word in text
    page = (tmp_path / "page.html").read_text()
    assert "Classes with the lowest average precision (AP) come first." in page
    assert "the geometric mean, over the classes, of the probability of the right answer" in page
    assert "label: " in page
    found = json.loads(printed("eval", folder, "--json", "--task", "threshold=0.6"))["results"][0]
    assert found["scores"]["threshold"] == 0.6
    assert found["scores"]["classes"] == list(CLASSES)
    assert set(found["metrics"]) == {"loss", "map", "cf1", "of1"}


def test_a_run_on_a_table_is_evaluated_on_another_folder(
    folder: Path, photos: Path, tmp_path: Path, printed: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(folder), "--data", f"label_table:{photos}"]) == 1
    assert "the data have fewer classes than the run, or in another order" in capsys.readouterr().err
    shutil.copytree(photos, tmp_path / "copy")
    recipe = replace(
        load_recipe(folder),
        name="table",
        data=DataSpec("label_table", {"root": str(photos), "classes": "classes.txt", "train": "val", "size": 32}),
        output=str(tmp_path / "runs"),
        batch_size=2,
    )
    run = train(recipe).folder
    assert str(tmp_path / "copy") in printed("eval", run, "--data", f"label_table:{tmp_path / 'copy'}")
    assert "6 images" in printed("eval", run)


def test_eval_refuses_images_with_one_label_and_options_of_classifiers(folder: Path, capsys: Any) -> None:
    assert cli.main(["eval", str(folder), "--data", "scales"]) == 1
    assert "the images of the data have one label at most, and the model is one for several" in capsys.readouterr().err
    assert cli.main(["eval", str(folder), "--all-outputs"]) == 1
    assert "several is a model for multilabel." in capsys.readouterr().err


def test_predict_lists_the_classes_from_the_threshold_on(
    folder: Path, photos: Path, printed: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "seen"
    text = printed("predict", folder, photos, "--out", out, "--csv", tmp_path / "seen.csv")
    assert "found" in text
    content = json.loads((out / "predict.json").read_text())
    assert content["classes"] == list(CLASSES)
    subject = load(str(folder))
    seen = predict(subject, photos)
    assert len(seen) == 6
    with (tmp_path / "seen.csv").open() as file:
        lines = list(csv.DictReader(file))
    for one, entry in zip(seen, content["images"], strict=True):
        prediction = one.prediction
        assert isinstance(prediction, LabelPrediction)
        assert torch.equal(torch.tensor(entry["probabilities"]), prediction.probabilities)
        given = [name for name, p in zip(CLASSES, prediction.probabilities.tolist(), strict=True) if p >= 0.3]
        assert sorted(found["name"] for found in entry["classes"]) == sorted(given)
        assert sorted(line["name"] for line in lines if line["image"] == entry["name"]) == sorted(given or [""])
        assert (out / "overlays" / entry["name"]).is_file()
    assert "from a probability of 0.3: " in (out / "predict.html").read_text()
    assert seen.save(tmp_path / "figure.png").is_file()


def test_nothing_above_the_threshold_is_said_so(folder: Path, photos: Path) -> None:
    (one,) = predict(load(str(folder)), photos / "0.png")
    none = LabelPrediction(one.prediction.probabilities / 100, 0.5)
    row = one.drawing.row(none)
    assert (row["classes"], row["found"]) == ("0", "-")
    assert row["next"].endswith(" %")
    assert one.drawing.entries(none) == []
    assert one.drawing.picture(one.image(), none).height > 40
    page = str(one.drawing.card("title", one.image(), none, LabelPrediction(torch.zeros(8))).parts)
    assert "from a probability of 0.5: none" in page
    assert "label: none" in page


def test_report_and_analyses_take_the_run(folder: Path, printed: Callable[..., str], tmp_path: Path) -> None:
    printed("report", folder, "--out", tmp_path / "report.html", "--count", 4)
    page = (tmp_path / "report.html").read_text()
    assert "Classes with the lowest average precision" in page
    assert "The class with the lowest average precision is " in page
    printed("cam", folder, "--count", 2, "--out", tmp_path / "cam")
    printed("erf", folder, "--count", 2, "--out", tmp_path / "erf")


def test_export_has_the_classes(folder: Path, printed: Callable[..., str], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnxruntime")
    printed("export", folder, "--out", tmp_path)
    session = onnx.InferenceSession(str(next(tmp_path.glob("*.onnx"))))
    (logits,) = session.run(None, {session.get_inputs()[0].name: np.zeros((3, 3, 32, 32), np.float32)})
    assert logits.shape == (3, len(CLASSES))
