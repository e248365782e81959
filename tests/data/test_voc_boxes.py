"""Boxes in Pascal VOC's XML files."""

import numpy as np
import pytest
import torch
from made_objects import write_image

from widefield import data
from widefield.data import AnnotationError

SIZES = ((40, 60), (50, 44), (48, 48))
OBJECTS = (
    [("dog", 1, 1, 60, 40, 0), ("person", 10, 12, 20, 30, 1)],
    [("cat", 5, 6, 5, 7, 0)],
    [],
)


def xml(size, objects, more=""):
    """Return a file of annotations as VOC writes it."""
    entries = "".join(
        f"<object><name>{name}</name><pose>Left</pose><difficult>{difficult}</difficult><bndbox><xmin>{x0}</xmin>"
        f"<ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin>"
        f"</bndbox></part></object>"
        for name, x0, y0, x1, y1, difficult in objects
    )
    height, width = size
    return (
        f"<annotation><filename>other.jpg</filename><size><width>{width}</width><height>{height}</height>"
        f"<depth>3</depth></size>{entries}{more}</annotation>"
    )


def write_voc(root, year="", stems=("2007_000001", "2007_000002", "2007_000003"), lists=("train", "val")):
    """Write the layout of VOC; each list has all images."""
    rng = np.random.default_rng(0)
    base = root / year
    for folder in ("Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    for stem, size, objects in zip(stems, SIZES, OBJECTS, strict=True):
        write_image(base / "JPEGImages" / f"{stem}.jpg", *size, rng)
        (base / "Annotations" / f"{stem}.xml").write_text(xml(size, objects))
    for name in lists:
        (base / f"ImageSets/Main/{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
    return base


def test_boxes_count_pixels_from_one_and_difficult_objects_are_crowds(tmp_path):
    write_voc(tmp_path)
    train, val = data.create_both("voc_boxes", root=tmp_path, scale=None, hflip=0)
    assert len(val.classes) == 20
    assert val.classes[:3] == ("aeroplane", "bicycle", "bird")
    first, second, third = val
    assert first["boxes"].tolist() == [[0, 0, 60, 40], [9, 11, 20, 30]]
    assert [val.classes[label] for label in first["labels"]] == ["dog", "person"]
    assert first["crowd"].tolist() == [False, True]
    assert first["area"].tolist() == [2400, 209]
    assert second["boxes"].tolist() == [[4, 5, 5, 7]]
    assert third["boxes"].shape == (0, 4)
    assert first["size"].tolist() == [40, 60]
    assert torch.equal(train[0]["boxes"], first["boxes"])
    assert train.batch_groups().tolist() == [0, 1, 0]
    assert val.found() == f"val: 3 images in {tmp_path}, 20 classes, 3 objects (1 image without)"


def test_lists_of_one_class_have_a_second_column(tmp_path):
    base = write_voc(tmp_path, lists=("train",))
    lines = "2007_000001 -1\r\n2007_000003  1\r\n"
    (base / "ImageSets/Main/dog_val.txt").write_text(lines, encoding="utf-8-sig")
    found = data.create("voc_boxes", "val", root=tmp_path, val="dog_val", scale=None)
    assert [sample["size"].tolist() for sample in found] == [[40, 60], [48, 48]]


def test_two_images_of_one_name_are_refused(tmp_path):
    base = write_voc(tmp_path)
    write_image(base / "JPEGImages/2007_000001.png", 40, 60, np.random.default_rng(0))
    with pytest.raises(AnnotationError, match=r"2007_000001.jpg' and '2007_000001.png', which have one XML file"):
        data.create("voc_boxes", "val", root=tmp_path)


def test_several_years_are_read_one_after_the_other(tmp_path):
    write_voc(tmp_path, "VOC2007", lists=("trainval", "test"))
    write_voc(tmp_path, "VOC2012", ("2008_000001", "2008_000002", "2008_000003"), lists=("trainval",))
    train, val = data.create_both(
        "voc_boxes", root=tmp_path, train=["VOC2007/trainval", "VOC2012/trainval"], val=["VOC2007/test"]
    )
    assert (len(train), len(val)) == (6, 3)
    assert train.name(5) == str(tmp_path / "VOC2012/JPEGImages/2008_000003.jpg")
    assert len(data.create("voc_boxes", "val", root=tmp_path, val="VOC2012/trainval")) == 3


def test_files_of_annotation_tools_need_no_lists(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(2):
            write_image(tmp_path / split / f"{number}.png", 30, 40, rng)
            (tmp_path / split / f"{number}.xml").write_text(xml((30, 40), [("ship", 0, 0, 40, 30, 0)]))
    options = {"lists": None, "annotations": "{split}", "images": "{split}", "val": "test", "classes": ["ship", "buoy"]}
    train, val = data.create_both("voc_boxes", root=tmp_path, **options)
    assert (len(train), len(val)) == (2, 2)
    assert val.classes == ("ship", "buoy")
    assert val[0]["boxes"].tolist() == [[-1, -1, 40, 30]]
    assert "left out" not in train.found()


GOOD = ("dog", 5, 5, 20, 20, 0)
FLAWS = {
    "outside": (
        xml(SIZES[0], [GOOD, ("dog", 70, 5, 90, 20, 0)]),
        r"object 1 of Annotations/.*1\.xml has a box outside",
    ),
    "zero area": (xml(SIZES[0], [GOOD, ("dog", 21, 5, 20, 20, 0)]), "object 1 of .* has a box without area: 0 x 16"),
    "NaN": (xml(SIZES[0], [GOOD, ("dog", "nan", 5, 20, 20, 0)]), "object 1 of .* has a box that is not finite"),
    "text": (xml(SIZES[0], [GOOD, ("dog", "five", 5, 20, 20, 0)]), "a box that is not four numbers: 'five', '5'"),
    "no box": (xml(SIZES[0], [GOOD], "<object><name>dog</name></object>"), "a box that is not four numbers: None"),
    "class": (xml(SIZES[0], [GOOD, ("persn", 5, 5, 20, 20, 0)]), "unknown class: 'persn'. Did you mean 'person'"),
    "no name": (xml(SIZES[0], [GOOD], "<object></object>"), "has an unknown class: ''"),
    "difficult": (xml(SIZES[0], [GOOD, ("dog", 5, 5, 20, 20, 3)]), "has a difficult that is neither 0 nor 1: '3'"),
    "no size": (xml((0, 0), [GOOD]), r"Annotations/2007_000001\.xml has no valid size: width '0', height '0'"),
    "truncated": (xml(SIZES[0], [GOOD])[:-20], r"Annotations/2007_000001\.xml is not complete XML"),
    "empty": ("", r"Annotations/2007_000001\.xml is not complete XML"),
    "other form": ("<html></html>", "its root is <'html'>, not <annotation>"),
}


@pytest.mark.parametrize("kind", FLAWS)
def test_a_flaw_is_refused_by_file_and_object_or_repaired_and_counted(tmp_path, kind):
    write_voc(tmp_path)
    text, message = FLAWS[kind]
    (tmp_path / "Annotations/2007_000001.xml").write_text(text)
    with pytest.raises(AnnotationError, match=message) as raised:
        data.create("voc_boxes", "val", root=tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: ")
    assert "set repair: true to" in str(raised.value)
    found = data.create("voc_boxes", "val", root=tmp_path, repair=True)
    assert "; repaired: 1 " in found.found()
    whole = kind not in ("truncated", "empty", "other form")
    assert len(found) == 2 + whole
    assert [len(sample["labels"]) for sample in found] == [1] * whole + [1, 0]


def test_missing_files_are_refused_by_name_or_counted(tmp_path):
    write_voc(tmp_path)
    (tmp_path / "Annotations/2007_000001.xml").unlink()
    (tmp_path / "JPEGImages/2007_000002.jpg").unlink()
    with pytest.raises(AnnotationError, match=r"Annotations/2007_000001\.xml is missing"):
        data.create("voc_boxes", "val", root=tmp_path)
    found = data.create("voc_boxes", "val", root=tmp_path, repair=True)
    assert len(found) == 1
    assert "1 images without an XML file" in found.found()
    assert "1 XML files without an image ('Annotations/2007_000002.xml')" in found.found()
    for options, error, text in (
        ({"val": "test"}, FileNotFoundError, r"no list of images .*test\.txt"),
        ({"annotations": "xml", "lists": None}, FileNotFoundError, "no folder .*xml"),
        ({"images": "jpg"}, FileNotFoundError, "no folder .*jpg"),
        ({"annotations": "JPEGImages", "lists": None}, FileNotFoundError, "holds no XML files"),
        ({"val": 3}, TypeError, "val must be the name of a list"),
        ({"classes": "dog"}, TypeError, "classes must be a list of names"),
        ({"masks": True}, ValueError, "have no masks"),
    ):
        with pytest.raises(error, match=text):
            data.create("voc_boxes", "val", root=tmp_path, **options)


def test_a_file_of_another_size_is_refused_or_left_out(tmp_path):
    write_voc(tmp_path)
    write_image(tmp_path / "JPEGImages/2007_000001.jpg", 33, 31, np.random.default_rng(0))
    with pytest.raises(AnnotationError, match=r"2007_000001\.jpg is 31 x 33 pixels.* are for 60 x 40"):
        data.create("voc_boxes", "val", root=tmp_path)[0]
    found = data.create("voc_boxes", "val", root=tmp_path, repair=True)
    assert len(found) == 2
    assert "1 images of another size than stated" in found.found()
