"""Boxes and polygons in YOLO's text files."""

import numpy as np
import pytest
import torch
from made_objects import write_image
from pycocotools import mask as reference

from tolerances import FLOAT32, close
from widefield import data
from widefield.data import AnnotationError

# NumPy 2 deprecates how pycocotools 2.0.11 makes arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BOX = "1 0.5 0.5 0.25 0.5"
POLYGON = "0 0.1 0.2 0.9 0.25 0.6 0.8"


def write_yolo(root, first=BOX, more="", name="data.yaml"):
    """Write a set: two images with objects and one without a text file in each split."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / f"labels/{split}").mkdir(parents=True)
        for number, size in enumerate(((40, 80), (60, 50), (30, 30))):
            write_image(root / f"images/{split}/{number}.png", *size, rng)
        (root / f"labels/{split}/0.txt").write_text(f"{first}\n{more}")
        (root / f"labels/{split}/1.txt").write_text("")
    (root / name).write_text("path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n")


def test_boxes_are_fractions_of_the_image(tmp_path):
    write_yolo(tmp_path, more="0 0.125 0.25 0.25 0.5\n\n")
    train, val = data.create_both("yolo", root=tmp_path, scale=None, hflip=0)
    assert val.classes == ("cat", "dog")
    first, second, third = val
    assert first["boxes"].tolist() == [[30, 10, 50, 30], [0, 0, 20, 20]]
    assert first["labels"].tolist() == [1, 0]
    assert first["area"].tolist() == [400, 400]
    assert not first["crowd"].any()
    assert len(second["labels"]) == len(third["labels"]) == 0
    assert torch.equal(train[0]["boxes"], first["boxes"])
    assert train.batch_groups().tolist() == [0, 1, 0]
    assert val.found() == f"val: 3 images in {tmp_path}, 2 classes, 2 objects (2 images without)"


def test_a_byte_order_mark_is_no_part_of_the_first_number(tmp_path):
    write_yolo(tmp_path)
    path = next(tmp_path.rglob("labels/**/*.txt"))
    before = [sample["boxes"].tolist() for sample in data.create("yolo", "val", root=tmp_path, scale=None)]
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert [sample["boxes"].tolist() for sample in data.create("yolo", "val", root=tmp_path, scale=None)] == before


def test_polygons_have_boxes_areas_and_masks(tmp_path):
    write_yolo(tmp_path, POLYGON)
    sample = data.create("yolo", "val", root=tmp_path, masks=True, scale=None)[0]
    corners = [8, 8, 72, 10, 48, 32]
    close(sample["boxes"], torch.tensor([[8.0, 8.0, 72.0, 32.0]]), FLOAT32)
    close(sample["area"], torch.tensor([0.5 * abs(64 * 24 - 40 * 2)]), FLOAT32)
    expected = reference.decode(reference.frPyObjects([corners], 40, 80))[..., 0]
    np.testing.assert_array_equal(sample["masks"][0].numpy(), expected.astype(bool))
    boxes = data.create("yolo", "val", root=tmp_path, scale=None)[0]
    assert torch.equal(boxes["boxes"], sample["boxes"])
    assert "masks" not in boxes


def test_other_layouts_are_found(tmp_path):
    write_yolo(tmp_path)
    # Written by tools: a path next to the description that starts with ../, names in a list, and no path.
    (tmp_path / "tool.yaml").write_text("train: ../images/train\nval: ../images/val\nnc: 2\nnames: [cat, dog]\n")
    tool = data.create("yolo", "val", root=tmp_path, description="tool.yaml")
    # A text file of paths, and several folders.
    (tmp_path / "val.txt").write_text("./images/val/0.png\nimages/val/1.png\n")
    (tmp_path / "list.yaml").write_text("train: [images/train, images/val]\nval: val.txt\nnames: [cat, dog]\n")
    train, listed = data.create_both("yolo", root=tmp_path, description="list.yaml")
    assert (len(tool), len(train), len(listed)) == (3, 6, 2)
    assert tool.fingerprint() != listed.fingerprint()
    assert torch.equal(tool[0]["boxes"], listed[0]["boxes"])
    # Text files next to the images, in another folder than the description.
    flat, elsewhere = tmp_path / "flat", tmp_path / "described"
    write_image(flat / "a.png", 20, 20, np.random.default_rng(0))
    (flat / "a.txt").write_text(BOX)
    elsewhere.mkdir()
    (elsewhere / "data.yaml").write_text(f"path: {flat}\ntrain: .\nval: .\nnames: [cat, dog]\n")
    assert data.create("yolo", "val", root=elsewhere)[0]["boxes"].tolist() == [[7.5, 5, 12.5, 15]]


FLAWS = {
    "outside": ("0 0.9 0.5 0.5 0.5", "line 2 of labels/val/0.txt has a box outside the image"),
    "zero area": ("0 0.5 0.5 0 0.5", "line 2 of .* has a box without area"),
    "NaN": ("0 0.5 nan 0.5 0.5", "line 2 of .* has coordinates that are not fractions of the image"),
    "pixels": ("0 30 20 10 10", "has coordinates that are not fractions of the image: '0 30 20 10 10'"),
    "text": ("cat 0.5 0.5 0.5 0.5", "line 2 of .* has words that are not numbers"),
    "class": ("2 0.5 0.5 0.5 0.5", "has an unknown class: 2, where the classes are 0 to 1"),
    "class with a fraction": ("0.5 0.5 0.5 0.5 0.5", "has an unknown class: 0.5"),
    "four numbers": ("0 0.5 0.5 0.5", "line 2 of .* has 4 numbers: a class and a box are 5"),
    "two points": ("0 0.5 0.5 0.5 0.5 0.6", "has 6 numbers"),
    "repeated": (BOX, "line 2 of .* repeats an earlier line"),
}


@pytest.mark.parametrize("kind", FLAWS)
def test_a_flaw_is_refused_by_file_and_line_or_repaired_and_counted(tmp_path, kind):
    line, message = FLAWS[kind]
    write_yolo(tmp_path, more=line)
    with pytest.raises(AnnotationError, match=message) as raised:
        data.create("yolo", "val", root=tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: line 2 of labels/val/0.txt")
    found = data.create("yolo", "val", root=tmp_path, repair=True)
    assert "; repaired: 1 " in found.found()
    assert [len(sample["labels"]) for sample in found] == [1 + (kind == "outside"), 0, 0]


def test_objects_without_a_polygon_have_no_mask(tmp_path):
    write_yolo(tmp_path)
    with pytest.raises(AnnotationError, match=r"line 1 of labels/val/0\.txt has no mask.*Set masks: false"):
        data.create("yolo", "val", root=tmp_path, masks=True)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("names: [cat", AnnotationError, "is not YAML"),
        ("- cat", AnnotationError, "must map train, val and names to their values"),
        (
            "train: images/train\nval: images/val",
            AnnotationError,
            "names must be a list of the classes' names.*it is None",
        ),
        ("val: images/val\nnames: {1: cat}", AnnotationError, "or map the numbers from 0"),
        ("val: images/val\nnames: [cat, cat]", AnnotationError, "names must differ"),
        ("val: images/val\nnames: [cat, dog]\nnc: 3", AnnotationError, "nc is 3, and there are 2 names"),
        ("train: images/train\nnames: [cat, dog]", AnnotationError, "val must be a folder, several, or a text file"),
        ("val: images/vel\nnames: [cat, dog]", FileNotFoundError, "val names 'images/vel', and there is no"),
        ("val: labels\nnames: [cat, dog]", FileNotFoundError, r"there are no images.*Left out: 4 not images"),
    ],
)
def test_a_wrong_description_is_refused_by_name(tmp_path, text, error, message):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(error, match=message) as raised:
        data.create("yolo", "val", root=tmp_path)
    assert "data.yaml" in str(raised.value)


def test_text_files_in_the_wrong_place_are_noticed(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "annotations")
    with pytest.raises(
        AnnotationError, match=r"none of the 3 images of the val split has a text file: 'labels/val/0.txt'"
    ):
        data.create("yolo", "val", root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no description .*other\.yaml"):
        data.create("yolo", "val", root=tmp_path, description="other.yaml")


def test_a_corrupt_image_is_refused_when_it_is_read_or_skipped(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "images/val/0.png").write_bytes(b"broken")
    with pytest.raises(data.CorruptImageError, match=r"0\.png"):
        data.create("yolo", "val", root=tmp_path)[0]
    found = data.create("yolo", "val", root=tmp_path, corrupt="skip", max_corrupt=0.5)
    with pytest.warns(UserWarning, match="It is left out"):
        assert found[0] is None
