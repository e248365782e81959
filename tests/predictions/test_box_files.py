"""Boxes of poses in files: COCO's annotations and results, and what is wrong in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from widefield.predictions.box_files import BoxFile, read_boxes
from widefield.predictions.coco_results import read_ids

IDS = {
    "images": [{"id": 7, "file_name": "a/first.jpg"}, {"id": 9, "file_name": "second.jpg"}],
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
}
RESULTS = [
    {"image_id": 7, "category_id": 18, "bbox": [1, 2, 3, 4], "score": 0.2},
    {"image_id": 7, "category_id": 1, "bbox": [5, 6, 7.5, 8], "score": 0.9, "segmentation": "..."},
]


def written(folder: Path, content: Any) -> Path:
    path = folder / "boxes.json"
    path.write_text(json.dumps(content))
    return path


def read(folder: Path, content: Any, **more: Any) -> BoxFile:
    return read_boxes(written(folder, content), ["person"], **more)


def test_results_with_the_ids_of_a_coco_file(tmp_path: Path) -> None:
    coco = tmp_path / "ids.json"
    coco.write_text(json.dumps(IDS))
    found = read(tmp_path, RESULTS, coco=coco)
    assert found.classes == ("person", "dog")
    boxes = found.of("a/first.jpg", (20, 30))
    assert boxes.boxes.tolist() == [[5, 6, 12.5, 14], [1, 2, 4, 6]]  # best first
    assert boxes.labels.tolist() == [0, 1]
    assert boxes.scores.tolist() == pytest.approx([0.9, 0.2])
    assert found.of("second.jpg", (20, 30)).boxes.shape == (0, 4)
    with pytest.raises(ValueError, match=r"no image 'third.jpg'"):
        found.of("third.jpg", (20, 30))


def test_results_alone_name_images_by_the_numbers_of_their_files(tmp_path: Path) -> None:
    found = read(tmp_path, RESULTS)
    assert found.classes == ("person", "category 18")
    for name in ("7.jpg", "000000000007.jpg", "x/COCO_val2014_000000000007.jpg"):
        assert len(found.of(name, (20, 30))) == 2
    assert len(found.of("000000000008.jpg", (20, 30))) == 0
    with pytest.raises(ValueError, match=r"'me.jpg' does not end with one"):
        found.of("me.jpg", (20, 30))


def test_annotations_without_crowds(tmp_path: Path) -> None:
    entries = [{key: value for key, value in one.items() if key != "score"} for one in RESULTS]
    found = read(tmp_path, {**IDS, "annotations": [*entries, {**entries[0], "iscrowd": 1}]})
    boxes = found.of("a/first.jpg", (20, 30))
    assert boxes.labels.tolist() == [1, 0]
    assert boxes.scores.tolist() == [1, 1]
    assert len(found.of("photos/second.jpg", (20, 30))) == 0
    with pytest.raises(ValueError, match=r"has no image 'secnd.jpg'. Did you mean 'second.jpg'"):
        found.of("secnd.jpg", (20, 30))


def test_boxes_of_another_image_size_are_refused(tmp_path: Path) -> None:
    found = read(tmp_path, RESULTS)
    with pytest.raises(ValueError, match=r"is outside of the image '7.jpg', which is 4x20. Are the boxes"):
        found.of("7.jpg", (20, 4))


def test_a_name_without_its_folder_is_of_one_image(tmp_path: Path) -> None:
    found = read(tmp_path, {**IDS, "annotations": [{**RESULTS[0], "image_id": 9}]})
    boxes = found.matched(["x/second.jpg", "a/first.jpg"])
    assert [len(boxes.of(name, (20, 30))) for name in ("x/second.jpg", "a/first.jpg")] == [1, 0]
    for names in (["x/second.jpg", "y/second.jpg"], ["x/second.jpg", "second.jpg"]):
        with pytest.raises(ValueError, match=r"has no image 'x/second.jpg'.* 2 of the images are called so"):
            found.matched(names)
    with pytest.raises(
        ValueError, match=r"has no image 'b.png' and 1 more of the 3\..* Add the images to the file, or"
    ):
        found.matched(["b.png", "second.jpg", "c.png"])


def test_ids_are_of_one_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"both 'x/7.jpg' and 'y/007.jpg' end with 7: give a COCO file"):
        read(tmp_path, RESULTS).matched(["x/7.jpg", "y/007.jpg"])
    coco = tmp_path / "ids.json"
    coco.write_text(json.dumps(IDS))
    ids = read_ids(coco)
    assert ids.of_images(["x/second.jpg"]).images == {"x/second.jpg": 9}
    for known in (ids.of_images, read(tmp_path, RESULTS, coco=coco).matched):
        with pytest.raises(ValueError, match=r"ids.json has no image 'x/second.jpg' and 1 more of the 2"):
            known(["x/second.jpg", "y/second.jpg"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"objects": []}, "holds no boxes: it is neither a list"),
        ([3], "entry 0 has no valid image_id; it is 3"),
        ([{**RESULTS[0], "image_id": "7"}], "entry 0 has no valid image_id"),
        ([RESULTS[0], {**RESULTS[1], "bbox": [1, 2, 3]}], "entry 1: a box must have 4 numbers"),
        ([{**RESULTS[0], "bbox": [1, 2, 0, 3]}], "entry 0: a box must have an area"),
        ([{**RESULTS[0], "bbox": [1, 2, "3", 3]}], "entry 0: box must be a finite number; got '3'"),
        ([{**RESULTS[0], "score": None}], "entry 0 has no valid score"),
        ([{**RESULTS[0], "score": float("nan")}], "entry 0: score must be a finite number"),
        ({**IDS, "annotations": [{**RESULTS[0], "image_id": 8}]}, "annotation 0 has the image_id 8, which the file"),
        ({**IDS, "annotations": [{**RESULTS[0], "category_id": 2}]}, "annotation 0 has the category_id 2"),
        ({"images": [{"id": 1}], "categories": [], "annotations": []}, "is not a COCO file with images"),
        ({"images": [{"name": "a", "poses": []}]}, "image 0 has no objects: the file is not of a detector"),
        (
            {"images": [{"name": "a", "objects": [{"name": "x", "score": 1, "box": [4, 0, 2, 9]}]}]},
            "object 0: a box must",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content)
