"""Objects drawn into images: where boxes, masks and labels come to lie, and the colors of classes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from colorblind import DICHROMATS, color_distance
from widefield import report
from widefield.data import object_palette
from widefield.drawing.annotating import Marks, annotated
from widefield.drawing.boxes import BoxDrawing, judged
from widefield.tasks import BoxPrediction
from widefield.tasks.detection_errors import BACKDROP, CLASSIFICATION, DUPLICATE, IGNORED, RIGHT

RED, BLUE = (200, 0, 0), (0, 0, 200)


def shares(first: Image.Image, second: Image.Image) -> np.ndarray:
    """Return which pixels of two images differ."""
    return (np.asarray(first) != np.asarray(second)).any(2)


def test_a_box_is_drawn_on_its_edges_and_nowhere_else() -> None:
    image = Image.new("RGB", (300, 200), "gray")
    boxes = np.array([[50.0, 40, 150, 120]])
    changed = shares(image, annotated(image, Marks(boxes, [RED], [[""]])))
    rows, columns = changed.nonzero()
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (49, 150, 39, 120)  # with the edge of the line
    assert not changed[45:115, 55:145].any()
    dashed = shares(image, annotated(image, Marks(boxes, [RED], [[""]], dashed=[True])))
    assert 0.2 < dashed.sum() / changed.sum() < 0.9


def test_masks_color_their_pixels_at_any_resolution() -> None:
    image = Image.new("RGB", (80, 40), "white")
    mask = np.zeros((1, 20, 40), dtype=bool)
    mask[0, 5:15, 10:30] = True
    found = np.asarray(annotated(image, Marks(np.array([[0.0, 0, 1, 1]]), [RED], [[""]], mask)))
    colored = (found == RED).all(2) | ((found[..., 0] > 200) & (found[..., 1] < 200))
    assert colored[10:30, 20:60].all()
    assert not colored[32:, :].any()
    assert not colored[:, 62:].any()


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (3000, 4), (3, 700), (640, 480)])
@pytest.mark.parametrize("count", [0, 1, 100])
def test_any_number_of_objects_fits_images_of_any_size(size: tuple[int, int], count: int) -> None:
    generator = np.random.default_rng(0)
    boxes = generator.uniform(-100, 800, (count, 4))  # also outside of the image, and with edges in the wrong order
    texts = [["a long name 0.91", ".91"]] * count
    found = annotated(Image.new("RGB", size), Marks(boxes, [BLUE] * count, texts))
    assert found.size == size


def test_labels_do_not_cover_each_other() -> None:
    """Every label is drawn alone in its color, so that what remains of it shows what covers it."""
    generator = np.random.default_rng(1)
    corners = generator.uniform(0, [600, 400], (30, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(5, 60, (30, 2))], 1)
    colors = [(10, 8 * k, 250 - 8 * k) for k in range(30)]
    image = Image.new("RGB", (640, 480), "black")
    found = np.asarray(annotated(image, Marks(boxes, colors, [["somebody 0.5", "0.5"]] * 30)))
    plain = np.asarray(annotated(image, Marks(boxes, colors, [[""]] * 30)))
    areas = [int(((found == color).all(2) & (plain != color).any(2)).sum()) for color in colors]
    full, short = 1100, 350  # pixels of a label's background, without its letters
    assert sum(area > full for area in areas) > 25
    assert all(area > short or area == 0 for area in areas)  # whole, or left out


def test_label_without_room_is_left_out() -> None:
    image = Image.new("RGB", (100, 30))
    box = np.array([[2.0, 2, 98, 28]])
    none = annotated(image, Marks(box, [RED], [[""]]))
    assert not shares(
        none, annotated(image, Marks(box, [RED], [["a very long name of a class that does not fit"]]))
    ).any()
    assert shares(
        none, annotated(image, Marks(box, [RED], [["a very long name of a class that does not fit", "a"]]))
    ).any()


@pytest.mark.parametrize("kind", DICHROMATS)
def test_color_blind_people_can_tell_the_first_seven_classes_apart(kind: str) -> None:
    palette = object_palette(["class"] * 30)
    distances = [color_distance(a, b, kind) for a, b in itertools.combinations(palette[:7], 2)]
    assert min(distances) > 10  # about four times what is just noticeable
    assert len(set(palette[:21])) == 21
    assert palette[21:] == palette[:9]


def _objects(boxes: list[list[float]], labels: list[int], **more: Any) -> BoxPrediction:
    return BoxPrediction(
        torch.tensor(boxes).view(-1, 4), torch.tensor(labels, dtype=torch.int64), size=(60, 80), **more
    )


TRUTH = _objects(
    [[0, 0, 20, 20], [30, 0, 50, 20], [0, 30, 80, 60]], [0, 1, 2], crowd=torch.tensor([False, False, True])
)


def test_right_and_wrong_detections_are_told_apart() -> None:
    found = _objects(
        [[0, 0, 20, 18], [1, 0, 20, 20], [30, 0, 50, 20], [5, 35, 15, 45], [5, 35, 15, 45], [60, 0, 80, 9]],
        [0, 0, 2, 2, 0, 1],
        scores=torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]),
    )
    right, duplicate, other_class, in_crowd, nothing, nothing_there = judged(found, TRUTH).kinds.tolist()
    assert (right, duplicate, other_class) == (RIGHT, DUPLICATE, CLASSIFICATION)
    assert (in_crowd, nothing, nothing_there) == (IGNORED, BACKDROP, BACKDROP)
    assert judged(found, TRUTH).found.tolist() == [True, False, False]
    nobody = _objects([], [], scores=torch.zeros(0))
    assert judged(nobody, TRUTH).found.tolist() == [False, False, False]
    assert judged(found, _objects([], [])).kinds.tolist() == [BACKDROP] * 6


def test_cards_rows_and_numbers_list_what_is_shown() -> None:
    drawing = BoxDrawing(("cat", "dog", "owl"), object_palette("abc"), min_score=0.5)
    masks = torch.zeros(3, 60, 80, dtype=torch.bool)
    masks[:, :20, :20] = True
    found = _objects(
        [[0, 0, 20, 20], [5, 5, 9, 9], [30, 0, 50, 20]], [0, 1, 1], scores=torch.tensor([0.9, 0.6, 0.4]), masks=masks
    )
    image = Image.new("RGB", (80, 60))
    assert drawing.row(found) == {"size": "80x60", "objects": "2", "found": "1 cat, 1 dog", "best": "cat 0.90"}
    data = drawing.data(found)["objects"]
    assert [entry["name"] for entry in data] == ["cat", "dog", "dog"]  # of all scores
    assert data[2]["box"] == [30, 0, 50, 20]
    card = report.fragment(drawing.card("x", image, found, TRUTH))
    assert "label: 3 objects, 1 not found (dashed)" in card
    assert "prediction: 2 objects with a score of at least 0.5; wrong (dashed): 1 background" in card
    assert "none is wrong" in report.fragment(drawing.card("x", image, found, found))
    assert "owl: 1" in card
    plain = report.fragment(drawing.card("x", image, found))
    assert plain.count("<img") == 2
    assert "cat: 1" in plain
    nothing = _objects([], [], scores=torch.zeros(0), masks=masks[:0])
    assert drawing.row(nothing)["best"] == "-"
    assert "0 objects with a score" in report.fragment(drawing.card("x", image, nothing))
    for one in (found, nothing):
        axis = report.blank(2, 2).subplots()
        drawing.panel(axis, image, one)
    (file,) = drawing.files(image, found).values()
    assert file.startswith(b"\x89PNG")
