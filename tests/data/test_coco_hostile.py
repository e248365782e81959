"""Damaged files in COCO's form: each loads, and every sample can be read, or the error names the file and the entry."""

import copy
import json
import math
import re

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from made_objects import damaged, mutations, write_coco, write_json
from PIL import Image

from widefield import data, tasks
from widefield.data import AnnotationError

NAMED = (
    r"annotation -?\d+ of image|annotations\[\d+\]|image -?\d+ |images\[\d+\]|\(image -?\d+\)|categories\[\d+\]"
    r"|not in COCO's form: (it has no )?(images|annotations|categories)|has no (images|categories): the list is empty"
    r"|is empty|is not complete JSON|holds (an?|null)|the val split in .* has no images"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    write_coco(folder)
    return folder


@pytest.fixture
def content(root):
    return json.loads((root / "annotations/instances_train2017.json").read_text())


def load(root, **options):
    """Load the val split, of which only the file of annotations is damaged, and read every sample."""
    found = data.create("coco", "val", root=root, images="train2017", masks=True, scale=None, **options)
    samples = list(found)
    for sample in samples:
        count, (height, width) = len(sample["labels"]), sample["size"].tolist()
        assert sample["image"].shape == (3, height, width)
        assert sample["masks"].shape == (count, height, width)
        left, top, right, bottom = sample["boxes"].unbind(1)
        assert ((right > left) & (bottom > top) & (left >= -1) & (right <= width + 1)).all()
        assert torch.isfinite(sample["area"]).all()
    return found, samples


def failure(root, **options):
    """Return the message with which the damaged file is refused, or None if every sample can be read."""
    try:
        load(root, **options)
    except AnnotationError as error:
        return str(error)
    return None


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(mutation=mutations())
def test_a_mutated_file_loads_or_its_error_names_the_entry(root, content, mutation):
    path = root / "annotations/instances_val2017.json"
    path.write_text(damaged(content, mutation))
    for options in ({}, {"repair": True}):
        error = failure(root, **options)
        if error is not None:
            assert re.search(NAMED, error)
            assert str(root) in error


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(mutation=mutations())
def test_a_mutated_file_trains_or_its_error_names_the_entry(root, content, mutation):
    (root / "annotations/instances_val2017.json").write_text(damaged(content, mutation))
    options = {"images": "train2017", "train": "val", "scale": (96, 64), "pipeline": "multi_scale_crop"}
    try:
        found = data.create("coco", "train", root=root, **options)
        batch = [sample for sample in found if sample is not None]
    except AnnotationError as error:
        message = str(error)
        assert re.search(NAMED.replace("val split", "train split"), message), message
        return
    task = tasks.create("detection", found, model="fcos", head_args={"neck_channels": 32, "num_convs": 1})
    backbone = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), features_only=True)
    model = task.model(backbone).train()
    task.loss(model, task.collate(batch)).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


def change(content, where, **values):
    """Change entries of an annotation, image or category, and return its id."""
    entry = content[where][2 if where == "annotations" else 1]
    entry.update(values)
    return entry


SIZES = "in an image of"
FLAWS = {
    "outside": (
        "annotations",
        {"bbox": [500, 500, 20, 20]},
        r"has a box outside the image: \(500, 500, 520, 520\) in an",
    ),
    "partly outside": ("annotations", {"bbox": [-9, 2, 30, 20]}, r"has a box outside the image: \(-9, 2, 21, 22\)"),
    "zero area": ("annotations", {"bbox": [5, 5, 0, 10]}, "has a box without area: 0 x 10 pixels"),
    "negative side": ("annotations", {"bbox": [5, 5, 4, -10]}, "has a box without area: 4 x -10 pixels"),
    "NaN": ("annotations", {"bbox": [5, math.nan, 4, 10]}, "has a box that is not finite"),
    "infinite": ("annotations", {"bbox": [5, 5, math.inf, 10]}, "has a box that is not finite"),
    "three numbers": ("annotations", {"bbox": [5, 5, 4]}, "has a bbox that is not four numbers"),
    "texts": ("annotations", {"bbox": ["5", "5", "4", "4"]}, "has a bbox that is not four numbers"),
    "category": ("annotations", {"category_id": 3}, "has an unknown category: 3"),
    "category as text": ("annotations", {"category_id": "person"}, "has an unknown category: 'person'"),
    "image": ("annotations", {"image_id": 12345}, "of image 12345 is of an image that is not listed"),
    "image as text": ("annotations", {"image_id": "1"}, "of image '1' is of an image that is not listed"),
    "two points": (
        "annotations",
        {"segmentation": [[1, 1, 9, 9]]},
        r"polygon \(number 0\) with 2 points, where at least 3",
    ),
    "odd polygon": ("annotations", {"segmentation": [[1, 1, 9, 9, 4, 1, 2]]}, "an odd number of coordinates: 7"),
    "flat polygon": ("annotations", {"segmentation": [1, 1, 9, 9, 4, 1]}, "that is not a list of numbers: 1"),
    "NaN in a polygon": ("annotations", {"segmentation": [[1, 1, 9, math.nan, 4, 1]]}, "is not a number of pixels"),
    "polygon outside": (
        "annotations",
        {"segmentation": [[300, 2, 320, 2, 320, 20]]},
        r"\d+ has a mask without a pixel in its image\. Correct",
    ),
    "polygon on a line": (
        "annotations",
        {"segmentation": [[4, 4, 8, 8, 20, 20]]},
        r"\d+ has a mask without a pixel in its image\. Correct",
    ),
    "no mask": ("annotations", {"segmentation": []}, r"has no mask: its segmentation is \[\]. Set masks: false"),
    "run lengths": (
        "annotations",
        {"segmentation": {"size": [2, 2], "counts": [4]}},
        r"has a mask that is damaged: the size of its run lengths is \[2, 2\]",
    ),
    "iscrowd": ("annotations", {"iscrowd": "no"}, "has an iscrowd that is neither 0 nor 1: 'no'"),
    "area": ("annotations", {"area": 0}, "has an area that is not a number of pixels above 0: 0"),
    "file": ("images", {"file_name": "gone.png"}, "has no file: .*gone.png' is missing"),
    "no file name": ("images", {"file_name": ["a"]}, "must have a file_name or coco_url"),
    "no size": ("images", {"width": 0}, "has no valid size: width 0, height"),
    "size as text": ("images", {"height": "48"}, "has no valid size: width .*, height '48'"),
}


@pytest.mark.parametrize("kind", FLAWS)
def test_a_flaw_is_refused_by_file_and_entry_or_repaired_and_counted(root, content, kind):
    where, values, text = FLAWS[kind]
    entry = change(content, where, **values)
    path = write_json(root, "val", content)
    named = f"annotation {entry['id']} of image" if where == "annotations" else f"image {entry['id']} "
    with pytest.raises(AnnotationError, match=text) as raised:
        load(root)
    assert str(raised.value).startswith(f"{path}: {named}")
    assert "or set repair: true to" in str(raised.value)
    found, samples = load(root, repair=True)
    assert named.strip() in found.found().split("; repaired: ")[1]
    objects = sum(len(sample["labels"]) for sample in samples)
    if where == "images":
        assert len(found) == 3
        assert objects < 10
    else:
        assert len(found) == 4
        assert objects == (10 if kind in ("partly outside", "area") else 9)


def test_run_lengths_without_a_pixel_are_refused(root, content):
    entry = content["annotations"][2]
    image = next(one for one in content["images"] if one["id"] == entry["image_id"])
    size = [image["height"], image["width"]]
    entry["segmentation"] = {"size": size, "counts": [size[0] * size[1]]}
    write_json(root, "val", content)
    with pytest.raises(
        AnnotationError,
        match=rf"annotation {entry['id']} of image \d+ has a mask without a pixel in its image\. Correct",
    ):
        load(root)
    assert "objects with an empty mask" in load(root, repair=True)[0].found()


def test_a_part_without_a_pixel_is_kept(root, content):
    """Splinters of larger masks are common; pycocotools draws nothing for them."""
    entry = content["annotations"][2]
    write_json(root, "val", content)
    before = load(root)[1]
    entry["segmentation"][0] += entry["segmentation"][0][-2:]  # the last point twice
    entry["segmentation"][0] = entry["segmentation"][0][:2] + entry["segmentation"][0]  # and the first
    entry["segmentation"].append([4, 9, 8, 9, 20, 9])
    write_json(root, "val", content)
    for one, other in zip(before, load(root)[1], strict=True):
        assert torch.equal(one["masks"], other["masks"])


def test_a_file_of_two_images_is_refused(root, content):
    content["images"][2]["file_name"] = content["images"][0]["file_name"]
    write_json(root, "val", content)
    named = f"image {content['images'][2]['id']} has the file of an earlier image"
    with pytest.raises(AnnotationError, match=named):
        load(root)
    assert len(load(root, repair=True)[0]) == 3


@pytest.mark.parametrize(("where", "key"), [("annotations", "annotations"), ("images", "images")])
def test_a_used_id_is_refused(root, content, where, key):
    content[where].append(copy.deepcopy(content[where][0]))
    write_json(root, "val", content)
    with pytest.raises(AnnotationError, match=rf"{key}\[{len(content[where]) - 1}\] has the id of an earlier"):
        load(root)
    found, samples = load(root, repair=True)
    assert len(found) == 4
    assert sum(len(sample["labels"]) for sample in samples) == 10
    assert "with a used id" in found.found()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty. Download or write it again"),
        ("  \n", "is empty"),
        ('{"images": [', "is not complete JSON: .*line 1 column"),
        (b"\xff\xfe\x00", "is not complete JSON"),
        ("[" * 100_000, "is not complete JSON"),
        ("[]", "holds a list where COCO's form has an object with the lists images, annotations, categories"),
        ('{"images": []}', "is not in COCO's form: it has no annotations"),
        ('{"images": {}, "annotations": [], "categories": []}', "images is an object, where a list is needed"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "has no images: the list"),
        ('{"images": [1], "annotations": [], "categories": []}', "has no categories: the list is empty"),
        ('{"images": [1], "annotations": [], "categories": [{"id": 1}]}', r"categories\[0\] must have an integer id"),
        ('{"images": [1], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
         r"categories\[1\] has the id or the name of an earlier category"),
        ('{"images": [1], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', r"images\[0\] must have an"),
        ('{"images": [{"id": 1}], "annotations": [7], "categories": [{"id": 1, "name": "a"}]}', "image 1 must have a"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_refused_by_name(root, text, message):
    path = root / "annotations/instances_val2017.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AnnotationError, match=message) as raised:
        load(root)
    assert str(path) in str(raised.value)


def test_a_missing_file_and_wrong_options_are_refused(root):
    with pytest.raises(FileNotFoundError, match=r"no file of annotations .*valid\.json.*by the option annotations"):
        data.create("coco", "val", root=root, annotations="valid.json")
    for options, error, text in (
        ({"categories": "person"}, TypeError, "categories must be a list of names"),
        ({"categories": ["car", "car"]}, ValueError, "categories must be different names"),
        ({"annotations": 3}, TypeError, "annotations must be a path"),
        ({"masks": "yes"}, TypeError, "masks must be True or False; got 'yes'"),
        ({"scales": 3}, TypeError, "Did you mean 'scale'"),
        ({"min_image_size": -1}, ValueError, "min_image_size must be at least 0"),
    ):
        with pytest.raises(error, match=text):
            data.create("coco", "train", root=root, **options)
    with pytest.raises(TypeError, match="needs the option root"):
        data.create("coco", "train")


def test_a_file_of_another_size_is_refused_when_it_is_read_or_left_out(tmp_path):
    content = write_coco(tmp_path)["val"]
    image = content["images"][1]
    path = tmp_path / "val2017" / image["file_name"]
    Image.fromarray(np.zeros((31, 33, 3), np.uint8)).save(path)
    found = data.create("coco", "val", root=tmp_path)
    size = f"{image['width']} x {image['height']}"
    with pytest.raises(
        AnnotationError, match=rf"{path.name} is 33 x 31 pixels.*\(image {image['id']}\) are for {size}"
    ):
        found[1]
    repaired = data.create("coco", "val", root=tmp_path, repair=True)
    assert len(repaired) == 2
    assert f"1 images of another size than stated ('image {image['id']}')" in repaired.found()
    assert "objects of images that are left out" in repaired.found()


def test_an_image_rotated_by_its_file_has_a_hint(tmp_path):
    image = write_coco(tmp_path)["val"]["images"][0]
    path = tmp_path / "val2017" / image["file_name"]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)
    with pytest.raises(AnnotationError, match="set exif_orientation: false"):
        data.create("coco", "val", root=tmp_path)[0]
    assert len(data.create("coco", "val", root=tmp_path, exif_orientation=False, repair=True)[0]["labels"]) == 4


def test_a_corrupt_image_is_refused_or_skipped(tmp_path):
    image = write_coco(tmp_path)["val"]["images"][0]
    path = tmp_path / "val2017" / image["file_name"]
    path.write_bytes(path.read_bytes()[:500])
    for repair in (False, True):
        with pytest.raises(data.CorruptImageError, match=path.name):
            data.create("coco", "val", root=tmp_path, repair=repair)[0]
    found = data.create("coco", "val", root=tmp_path, corrupt="skip", max_corrupt=0.5)
    with pytest.warns(UserWarning, match="It is left out"):
        assert found[0] is None
