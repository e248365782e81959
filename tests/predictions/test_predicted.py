"""Predictions as objects: they draw themselves, list themselves as CSV and lines of JSON, and take images in memory."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import widefield
from tolerances import FLOAT32, close
from widefield.data import Skeleton
from widefield.drawing.annotating import with_bars
from widefield.drawing.kinds import drawing_of
from widefield.predictions.predicted import Predicted, Predictions, Unreadable
from widefield.tasks import BoxPrediction, ClassPrediction, MaskPrediction, PosePrediction, ReconstructionPrediction

NAMES = ("cat", "dog", "a name that is far too long for the line under a picture")
PALETTE = ((255, 0, 0), (0, 0, 255), (0, 160, 0))
SKELETON = Skeleton(("head", "foot"), (0, 1), (0.1, 0.1), ((0, 1),))
PREDICTIONS: dict[str, Any] = {
    "classes": ClassPrediction(torch.tensor([0.7, 0.2, 0.1])),
    "pixels": MaskPrediction(torch.tensor([[0, 0, 1], [0, 0, 1]], dtype=torch.uint8).repeat(20, 20)),
    "objects": BoxPrediction(
        torch.tensor([[5.0, 5, 30, 30], [10, 10, 20, 20]]), torch.tensor([1, 0]), torch.tensor([0.9, 0.1]),
        size=(40, 60),
    ),
    "nothing": BoxPrediction(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0), size=(40, 60)),
    "poses": PosePrediction(
        torch.tensor([[[10.0, 8], [10, 30]]]), torch.tensor([[0.9, 0.8]]), torch.tensor([0.85]),
        torch.tensor([[5.0, 5, 20, 35]]), size=(40, 60), skeleton=SKELETON,
    ),
    "hidden": ReconstructionPrediction(
        torch.zeros(3, 40, 60, dtype=torch.uint8), torch.ones(40, 60, dtype=torch.bool),
        torch.full((3, 40, 60), 51, dtype=torch.uint8),
    ),
}  # fmt: skip
LINES = {
    "classes": [
        ["rank", "label", "name", "probability"],
        ["1", "0", "cat", "0.7"],
        ["2", "1", "dog", "0.2"],
    ],
    "pixels": [["label", "name", "share"], ["0", "cat", "0.666667"], ["1", "dog", "0.333333"]],
    "objects": [
        ["label", "name", "score", "left", "top", "right", "bottom"],
        ["1", "dog", "0.9", "5", "5", "30", "30"],
    ],
    "nothing": [["label", "name", "score", "left", "top", "right", "bottom"], [""] * 7],
    "poses": [
        ["pose", "label", "name", "score", "left", "top", "right", "bottom", "keypoint", "x", "y", "keypoint_score"],
        ["1", "", "", "0.85", "5", "5", "20", "35", "head", "10", "8", "0.9"],
        ["1", "", "", "0.85", "5", "5", "20", "35", "foot", "10", "30", "0.8"],
    ],
    "hidden": [["masked", "difference"], ["1", "51"]],
}


def made(kind: str, number: int = 0) -> Predicted:
    image = Image.effect_noise((60, 40), 50).convert("RGB")
    prediction = PREDICTIONS[kind]
    drawing = drawing_of(prediction, NAMES, PALETTE, top=2)
    return Predicted(Path(f"{kind}.png"), f"{kind}-{number}", prediction, drawing, {}, image)


def together(*images: Predicted, lost: tuple[Unreadable, ...] = ()) -> Predictions:
    return Predictions("net", "random", {}, NAMES, PALETTE, 2, images, lost)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_an_image_draws_itself(kind: str, tmp_path: Path) -> None:
    found = made(kind)
    picture = found.picture()
    assert not np.array_equal(np.asarray(picture)[:40, :60], np.asarray(found.image())) or kind in (
        "nothing",
        "classes",
    )
    with Image.open(io.BytesIO(found._repr_png_())) as shown:
        assert max(shown.size) <= 640
    assert found.name in found._repr_html_()
    with Image.open(found.save(tmp_path / "one.png")) as written:
        assert written.size == picture.size
    assert json.loads(found.save(tmp_path / "one.json").read_text())["name"] == found.name
    with pytest.raises(ValueError, match="suffix"):
        found.save(tmp_path / "one.gif")
    folders = {path.parent.name for path in found.write_files(tmp_path)}
    assert folders == {"pixels": {"overlays", "labels"}, "hidden": {"reconstructions"}}.get(kind, {"overlays"})


def test_the_picture_of_a_classifier_has_bars_of_the_shares() -> None:
    image = Image.new("RGB", (400, 100), "black")
    found = np.asarray(with_bars(image, {"x": 0.5, NAMES[2]: 1.0, "y": 0.0}))
    assert found.shape[1] == 400
    assert (found[:100] == 0).all()
    blue = (found[100:] == (173, 205, 233)).all(-1).sum(1)
    widths = sorted({int(width) for width in blue if width > 0})
    assert max(widths) > 1.9 * 180  # the whole line
    assert (found[100:, -3:] == 255).all()  # nothing runs out of the picture


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_tables_list_what_is_shown(kind: str, tmp_path: Path) -> None:
    lost = Unreadable(Path("broken.png"), "it is damaged")
    several = together(made(kind), lost=(lost,))
    header, *lines = csv.reader(several.save(tmp_path / "seen.csv").read_text().splitlines())
    expected, *rows = LINES[kind]
    assert header == ["image", "path", *expected, "error"]
    assert lines[:-1] == [[f"{kind}-0", f"{kind}.png", *row, ""] for row in rows]
    assert lines[-1] == ["", "broken.png", *[""] * len(expected), "it is damaged"]
    first, last = (json.loads(line) for line in several.save(tmp_path / "seen.jsonl").read_text().splitlines())
    assert first == several[0].to_dict()
    assert last == {"path": "broken.png", "error": "it is damaged"}


def test_a_table_without_any_image_has_the_errors(tmp_path: Path) -> None:
    path = together(lost=(Unreadable(Path("a.png"), "bad, very"),)).save(tmp_path / "seen.csv")
    assert path.read_text() == 'image,path,error\n,a.png,"bad, very"\n'


def test_slices_are_predictions() -> None:
    several = together(*(made("classes", number) for number in range(4)))
    assert [found.name for found in several[1:3]] == ["classes-1", "classes-2"]
    html = several[1:3]._repr_html_()
    assert "classes-1" in html
    assert "classes-0" not in html
    assert [found.name for found in several] == [f"classes-{number}" for number in range(4)]
    assert str(several[0]) == "image: classes-0, class: cat, probability: 70.0 %, next: dog"


# Images in memory


def test_images_in_memory_are_predicted_as_files_are(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval()
    image = Image.effect_noise((90, 70), 80).convert("RGB")
    image.save(tmp_path / "a.png")
    file = widefield.predict(model, tmp_path / "a.png")
    several = widefield.predict(model, [np.asarray(image), image, image.convert("L")], batch_size=3)
    assert [found.name for found in several] == ["image-1", "image-2", "image-3"]
    alone = widefield.predict(model, image)
    assert alone[0].to_dict()["classes"] == file[0].to_dict()["classes"]
    for found in several[:2]:  # a batch of another size may round in another order
        close(found.prediction.probabilities, alone[0].prediction.probabilities, FLOAT32)
    assert several[2].image().mode == "RGB"
    assert several.save(tmp_path / "seen.png").is_file()


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((4, 4, 3)), TypeError, "must be uint8, from 0 to 255; got float64"),
        (np.zeros((3, 4, 4), np.uint8), ValueError, r"must be \(H, W, 3\) or \(H, W\); got shape \(3, 4, 4\)"),
        (
            [Image.new("RGB", (4, 4)), "a.png"],
            TypeError,
            "images must be paths of files or folders, or globs, or images",
        ),
    ],
)
def test_other_arrays_are_refused(images: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        widefield.predict(timm.create_model("test_resnet", num_classes=4), images)


def test_a_loaded_model_takes_no_options_of_loading() -> None:
    with pytest.raises(TypeError, match="the model is loaded already; it takes no pretrained"):
        widefield.predict(timm.create_model("test_resnet"), Image.new("RGB", (4, 4)), pretrained=True)
