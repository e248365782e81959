"""The commands on a segmentation run: predict, eval, report, erf and cam; and on torchvision's segmentation models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from train.helpers import QUIET, log
from widefield import cli
from widefield.data import joint
from widefield.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from widefield.loading import load
from widefield.predictions import predict
from widefield.train import DataSpec, ModelSpec, Recipe, TaskSpec, train

NAMES = ("ground", "brick", "water")
PALETTE = ((90, 90, 90), (200, 60, 60), (70, 90, 210))
ATTO = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
SEGMENTER = "torchvision:lraspp_mobilenet_v3_large{num_classes: 3}"


def made_set(root: Path, val: int = 5) -> Path:
    """Write images of different sizes whose class is their color, and their masks, as the set ``masks`` takes them."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", val)):
        for index in range(count):
            height, width = (int(side) for side in generator.integers(40, 70, 2))
            coarse = generator.integers(3, size=(height // 16 + 1, width // 16 + 1), dtype=np.uint8)
            mask = np.kron(coarse, np.ones((16, 16), np.uint8))[:height, :width]
            mask[0] = 255
            pixels = np.array([*PALETTE, *[(0, 0, 0)] * 253])[mask] + generator.integers(-20, 20, (height, width, 3))
            for folder, values in (("images", pixels.clip(0, 255)), ("masks", mask)):
                path = root / folder / split / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values.astype(np.uint8)).save(path)
    lines = [f"{name},{','.join(map(str, color))}" for name, color in zip(NAMES, PALETTE, strict=True)]
    (root / "classes.txt").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_set(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def trained(shapes: Path) -> Path:
    """Return a short run on the made set, whose val images are shrunk to 32 pixels."""
    torch.manual_seed(0)
    options = {"root": str(shapes), "classes": str(shapes / "classes.txt"), "size": 32, "test_scale": [200, 32]}
    recipe = Recipe(
        name="shapes",
        model=ModelSpec("convnext_atto", ATTO),
        data=DataSpec("masks", options),
        task=TaskSpec("segmentation", {"head_args": {"channels": 8}}),
        output=str(shapes / "runs"),
        epochs=None,
        max_steps=6,
        evaluate_every=6,
        batch_size=4,
        workers=0,
    )
    return train(recipe, console=QUIET).folder


# predict


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image).copy()


def by_hand(folder: Path, path: Path) -> torch.Tensor:
    """Return the mask of an image, from the transform, the model and a resize of its logits."""
    image = torch.from_numpy(pixels(path)).movedim(-1, 0)
    transform = joint.evaluation((200, 32), IMAGENET_MEAN, IMAGENET_STD)
    prepared = joint.apply(transform, {"image": image})
    with torch.no_grad():
        logits = load(str(folder)).model(prepared["image"][None])
    return F.interpolate(logits, image.shape[1:], mode="bilinear").argmax(1)[0]


def test_blocks_of_a_run_are_measured_with_its_masks(trained: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["blocks", str(trained), "--count", "3", "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "blocks.json").read_text())["results"].values()
    assert (found["metric"], found["about"]["images"], len(found["blocks"])) == ("mIoU", 3, 4)
    assert 0 <= found["score"] <= 1
    assert "backbone.body.stages_0.blocks.0" in capsys.readouterr().out
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")


def test_masks_have_the_size_of_their_files(trained: Path, shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["predict", str(trained), str(shapes / "images/val"), "--out", str(out)]) == 0
    for path in sorted((shapes / "images/val").iterdir()):
        written = pixels(out / "labels" / path.name)
        assert torch.equal(torch.from_numpy(written).long(), by_hand(trained, path))
        with Image.open(out / "labels" / path.name) as image:
            assert image.getpalette()[:9] == [channel for color in PALETTE for channel in color]
        assert pixels(out / "overlays" / path.name).shape == pixels(path).shape
    stored = json.loads((out / "predict.json").read_text())
    assert stored["palette"] == [list(color) for color in PALETTE]
    assert stored["about"]["test_scale"] == [200, 32]
    for image in stored["images"]:
        assert sum(entry["share"] for entry in image["classes"]) == pytest.approx(1)
    page = (out / "predict.html").read_text()
    assert page.count("<img") == 3 * 5
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_size_is_the_shorter_side(trained: Path, shapes: Path) -> None:
    found = predict(trained, shapes / "images/val/0.png", size=64)
    assert found.about["test_scale"][1] == 64
    assert tuple(found[0].prediction.mask.shape) == pixels(shapes / "images/val/0.png").shape[:2]


def test_torchvisions_segmentation_models_predict_by_name(shapes: Path, tmp_path: Path) -> None:
    words = ["predict", SEGMENTER, str(shapes / "images/val/0.png"), "--size", "48", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    assert pixels(tmp_path / "labels/0.png").max() < 3
    assert "class " in (tmp_path / "predict.html").read_text()


# eval


def evaluated(tmp_path: Path, *words: object) -> dict[str, Any]:
    file = tmp_path / "results.json"
    common = ["--device", "cpu", "--workers", "0", "--out", str(file)]
    assert cli.main(["eval", *map(str, words), *common]) == 0
    (found,) = json.loads(file.read_text())["results"]
    return found


def test_a_run_is_evaluated_as_it_evaluated_itself(
    trained: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    page = tmp_path / "page.html"
    found = evaluated(tmp_path, trained, "--page", page, "--examples", 2)
    last = log(trained)[-1]
    assert found["metrics"] == {name: last[name] for name in ("loss", "miou", "macc", "aacc")}
    assert (found["images"], found["size"], found["classes"], found["outputs"]) == (5, None, 3, 3)
    assert found["scores"]["classes"] == list(NAMES)
    confusion = np.array(found["scores"]["confusion"])
    masks = [pixels(path) for path in (shapes / "masks/val").iterdir()]
    assert confusion.sum(1).tolist() == [sum(int((mask == k).sum()) for mask in masks) for k in range(3)]
    shown = capsys.readouterr().out
    assert f"{100 * last['miou']:.2f}%" in shown
    assert "mistaken for" in shown
    assert "varied" in shown
    text = page.read_text()
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings == ["Metrics", "Classes", "What is mistaken for what", "Best images", "Worst images"]
    assert text.count('<div class="card">') == 4
    ratings = [float(value) for value in re.findall(r"<h3>\d\.png: ([\d.]+) %</h3>", text)]
    assert ratings[:2] == sorted(ratings, reverse=True)[:2]
    assert ratings[2:] == sorted(ratings)[:2]


def test_options_of_the_task_and_the_size_can_be_changed(trained: Path, tmp_path: Path) -> None:
    plain = evaluated(tmp_path, trained)
    slid = evaluated(tmp_path, trained, "--task", "test=slide", "window=[32, 32]", "flip=true")
    assert slid["metrics"]["loss"] != plain["metrics"]["loss"]
    larger = evaluated(tmp_path, trained, "--size", 64)
    assert larger["data"]["test_scale"][1] == 64
    assert larger["data"]["size"] == 32  # of the train images
    assert larger["metrics"]["loss"] != plain["metrics"]["loss"]


def test_other_data_of_the_same_layout_are_read_with_the_runs_options(trained: Path, tmp_path: Path) -> None:
    root = made_set(tmp_path / "other", val=2)
    found = evaluated(tmp_path, trained, "--data", root)
    assert (found["images"], found["data"]["root"], found["data"]["test_scale"]) == (2, str(root), [200, 32])


def test_throughput_of_images_that_differ_is_that_of_the_first(trained: Path, tmp_path: Path) -> None:
    found = evaluated(tmp_path, trained, "--throughput", "--batch-size", 1)
    assert found["images_per_second"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--real"], "--real is for classifiers, and shapes is a model for segmentation"),
        (["RUN", "--crop-pct", "0.9"], "--crop-pct is for classifiers"),
        (["RUN", "--data", "digits"], "the data have no masks, and the model is one for segmentation"),
        (["RUN", "--data", "scenes"], "the classes of the data have changed since the run"),
        (["RUN", "--task", "flp=true"], "has no option 'flp'. Did you mean 'flip'"),
        ([SEGMENTER, "--data", "scenes"], "the model tells 3 classes apart, and the data have 9"),
        (["test_resnet{num_classes: 9}", "--data", "scenes"], "the data have no labeled images, and the model is a"),
        (["test_resnet{num_classes: 10}", "--data", "digits", "--task", "a=1"], "is not a run"),
    ],
)
def test_what_does_not_fit_is_one_line(
    words: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", *(str(trained) if word == "RUN" else word for word in words)]) == 1
    error = capsys.readouterr().err
    assert message in error.replace(str(trained), "shapes")
    assert error.count("\n") == 1


# report and analyses


def test_a_report_evaluates_the_run_and_shows_what_applies(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert cli.main(["report", str(trained), "--count", "1", "--out", str(out)]) == 0
    text = out.read_text()
    headings = re.findall("<h2>(.*?)</h2>", text)
    for heading in ("Metrics", "Classes", "Best images", "Effective receptive field", "Class activation"):
        assert heading in headings
    assert "Effective receptive field of the class logit in the center" in headings
    assert "Not of shapes: UPerNet is a segmentation model" in text
    assert "A seeded choice of 5; widefield eval takes all." in text
    found = json.loads(out.with_suffix(".json").read_text())["results"]
    assert found["Evaluation"]["shapes"]["images"] == 4
    assert found["Evaluation"]["shapes"]["scores"]["classes"] == list(NAMES)


def test_a_report_of_a_run_whose_data_are_gone(trained: Path, shapes: Path, tmp_path: Path) -> None:
    moved = shapes / "moved"
    (shapes / "images").rename(moved)
    try:
        assert cli.main(["report", str(trained), "--count", "1", "--out", str(tmp_path / "report.html")]) == 0
    finally:
        moved.rename(shapes / "images")
    text = (tmp_path / "report.html").read_text()
    assert "Evaluation: left out" in text
    assert "the data of the run &#39;shapes&#39; are missing" in text


def test_classes_have_the_names_of_the_run(trained: Path, tmp_path: Path) -> None:
    words = [str(trained), "--count", "1", "--class", "water", "--out", str(tmp_path)]
    assert cli.main(["erf", *words, "--pixel", "3", "20"]) == 0
    (found,) = json.loads((tmp_path / "erf.json").read_text())["results"].values()
    assert found["of"] == "water at pixel (3, 20)"
    assert cli.main(["cam", *words, "--region", "0", "0", "9", "9"]) == 0
    (found,) = json.loads((tmp_path / "cam.json").read_text())["results"].values()
    assert (found["labels"], found["about"]["of"]) == (["water"], "region (0, 0, 9, 9)")


def test_results_are_split_by_size_where_the_data_know_it(tmp_path: Path) -> None:
    recipe = Recipe(
        name="scenes",
        model=ModelSpec("convnext_atto", ATTO),
        data=DataSpec("scenes", {"count": 6, "size": 32}),
        task=TaskSpec("segmentation", {"head_args": {"channels": 8}}),
        output=str(tmp_path),
        epochs=None,
        max_steps=1,
        evaluate_every=1,
        batch_size=4,
        workers=0,
    )
    folder = train(recipe, console=QUIET).folder
    page = tmp_path / "page.html"
    found = evaluated(tmp_path, folder, "--page", page)
    assert found["size"] == 32
    assert "Classes by object size" in page.read_text()
    assert {"miou_small", "miou_medium", "miou_large"} <= found["metrics"].keys()
