"""The commands on a detection run: predict, eval, report, erf, cam and object-erf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from documents import document
from train.helpers import QUIET
from widefield import cli
from widefield.loading import load
from widefield.predictions import predict
from widefield.tasks import BoxPrediction
from widefield.train import DataSpec, ModelSpec, Recipe, TaskSpec, train

HEAD = {"neck_channels": 8, "box_channels": 8, "rois_per_image": 8, "anchor_scales": [2.0], "test_proposals": 20,
        "score_threshold": 0.0}  # fmt: skip
NETWORK = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a short run of a small Mask R-CNN on scenes."""
    torch.manual_seed(0)
    recipe = Recipe(
        name="objects",
        model=ModelSpec("convnext_atto", NETWORK),
        data=DataSpec("scenes", {"size": 64, "count": 6}),
        task=TaskSpec("detection", {"model": "mask_rcnn", "head_args": HEAD}),
        output=str(tmp_path_factory.mktemp("runs")),
        max_steps=2,
        batch_size=2,
        workers=0,
    )
    return train(recipe, console=QUIET).folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name, shape in {"000000000139.png": (80, 64, 3), "small/000000000285.jpg": (20, 24, 3)}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(256, size=shape, dtype=np.uint8)).save(folder / name)
    return folder


def test_predictions_are_pictures_and_coco_results(
    trained: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = load(str(trained)).class_names
    ids = {
        "images": [{"id": 139, "file_name": "000000000139.png"}, {"id": 285, "file_name": "000000000285.jpg"}],
        "categories": [{"id": 10 * k, "name": name} for k, name in enumerate(reversed(names), start=1)],
    }
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    out = tmp_path / "out"
    words = ["predict", str(trained), str(photos), "--out", str(out), "--min-score", "0", "--size", "64"]
    assert cli.main([*words, "--coco", str(tmp_path / "ids.json")]) == 0
    printed = capsys.readouterr().out
    assert "objects" in printed
    assert {path.name for path in out.iterdir()} == {
        "overlays", "predict.html", "predict.json", "predict.png", "predict_coco.json",
    }  # fmt: skip
    images = json.loads((out / "predict.json").read_text())["images"]
    assert [image["image_id"] for image in images] == [139, 285]
    assert [image["size"] for image in images] == [[80, 64], [20, 24]]
    entries = json.loads((out / "predict_coco.json").read_text())
    by_name = {one["name"]: one["id"] for one in ids["categories"]}
    listed = [(image["image_id"], one) for image in images for one in image["objects"]]
    assert len(listed) == len(entries) > 0
    for (number, one), entry in zip(listed, entries, strict=True):
        assert (entry["image_id"], entry["category_id"], entry["score"]) == (number, by_name[one["name"]], one["score"])
        left, top, width, height = entry["bbox"]
        np.testing.assert_allclose([left, top, left + width, top + height], one["box"], atol=1e-4)
        assert entry["segmentation"]["size"] == ([80, 64] if number == 139 else [20, 24])
    with Image.open(out / "overlays/small/000000000285.png") as shown:
        assert shown.size == (24 * (640 // 24), 20 * (640 // 24))  # enlarged


def test_boxes_are_in_pixels_of_the_file(trained: Path, photos: Path) -> None:
    found = predict(str(trained), photos / "000000000139.png", size=32)[0]
    assert isinstance(found.prediction, BoxPrediction)
    subject = load(str(trained))
    image = subject.prepare(32)(found.image())
    assert image.shape[1:] == (40, 32)
    with torch.no_grad():
        (expected,) = subject.model(image[None])
    torch.testing.assert_close(found.prediction.boxes, 2 * expected.boxes)
    assert found.prediction.masks is not None
    assert found.prediction.masks.shape[1:] == (80, 64)
    assert predict(subject, photos, min_score=0.99).rows()[0]["objects"] == "0"


def test_an_evaluation_has_a_page_with_classes_sizes_errors_and_images(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, out = tmp_path / "page.html", tmp_path / "out.json"
    words = ["eval", str(trained), "--workers", "0", "--page", str(page), "--out", str(out), "--examples", "1"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "box_ap50" in printed
    assert "errors, mask: AP50" in printed
    text = page.read_text()
    for heading in ("COCO&#39;s figures", "Classes", "Objects by size", "Types of errors", "What is mistaken for what",
                    "Best images", "Worst images"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in text
    assert "not found (dashed)" in text
    assert "average precision of its boxes" in text
    (result,) = json.loads(out.read_text())["results"]
    assert set(result["scores"]) >= {"metrics", "box", "mask", "confusion"}
    assert result["classes"] == 8


def test_a_report_shows_evaluation_and_receptive_fields_of_objects(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(trained), "--out", str(tmp_path / "report.html"), "--count", "1"]) == 0
    text = (tmp_path / "report.html").read_text()
    for heading in ("Types of errors", "Effective receptive fields of objects", "Class activation"):
        assert f"<h2>{heading}</h2>" in text
    assert "Translation stability" not in text  # it compares scores of classes
    found = json.loads((tmp_path / "report.json").read_text())["results"]
    assert found["Effective receptive fields of objects"]["objects"]["groups"]
    assert found["Evaluation"]["objects"]["scores"]["box"]


def result(folder: Path, *words: str) -> dict[str, Any]:
    """Return what a command of an analysis writes for the run."""
    assert cli.main([*words, "--out", str(folder)]) == 0
    found: dict[str, Any] = json.loads((folder / f"{words[0]}.json").read_text())["results"]["objects"]
    return found


def test_the_field_of_one_detection_and_of_a_box(trained: Path, tmp_path: Path) -> None:
    best = result(tmp_path, "erf", str(trained), "--detection")
    assert best["about"]["images"] == 1
    assert str(best["of"]).startswith("detection 0, ")
    name = load(str(trained)).class_names[2]
    words = ["--box", "8", "8", "40", "48", "--class", name, "--count", "3"]
    box = result(tmp_path, "erf", str(trained), *words)
    assert box["of"] == f"{name} at box (8, 8, 40, 48)"
    assert box["box"] == [8, 8, 40, 48]


def test_the_activation_of_detections(trained: Path, tmp_path: Path) -> None:
    found = result(tmp_path, "cam", str(trained), "--detection", "1", "--count", "2")
    assert np.array(found["boxes"]).shape == (2, 4)


def test_fields_of_objects_by_size(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--count", "4", "--sizes", "16", "--objects", "2", "--unit", "center"]
    found = result(tmp_path, "object-erf", str(trained), *words, "--json")
    assert [group["objects"] for group in found["groups"]] == [2, 2]
    assert (tmp_path / "object-erf.html").is_file()
    assert list(document(capsys.readouterr().out)["results"].values()) == [found]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["erf", "RUN", "--detection", "9999"], "has no detection 9999 in this image"),
        (["erf", "RUN", "--detection", "--count", "2"], "give one image, or a box"),
        (["erf", "test_resnet", "--size", "64", "--detection"], "needs a detector of widefield.dense"),
        (["object-erf", "test_resnet"], "object-erf needs a detector of widefield.dense, and test_resnet"),
        (["predict", "RUN", "photo.png", "--min-score", "2"], "min_score"),
        (["eval", "RUN", "--data", "digits"], "no objects with boxes"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40)).save("photo.png")
    assert cli.main([str(trained) if word == "RUN" else word for word in words]) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.strip().count("\n") == 0


@pytest.mark.slow
def test_a_file_of_a_run_finds_what_the_run_finds(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(trained), "--count", "4", "--batch-size", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "of the run's own data" in printed
    assert "box AP" in printed
    stored = json.loads((tmp_path / "objects.onnx.json").read_text())
    assert stored["detection"]["nms"] == "inside"
    assert stored["input"]["dynamic"] == ["batch", "size"]
    assert stored["classes"] == list(load(str(trained)).class_names)
