"""Damaged key points: each file loads, and every sample can be read, or the error names the file and the entry."""

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from made_objects import damaged, mutations
from made_poses import write_keypoints, write_people

from widefield.data import AnnotationError, CocoKeypoints

NAMED = (
    r"annotation -?\d+ of image|annotations\[\d+\]|image -?\d+ |images\[\d+\]|\(image -?\d+\)|categories\[\d+\]|box \d+"
    r"|not in COCO's form: (it has no )?(images|annotations|categories)|has no (images|categories): the list is empty"
    r"|is empty|is not complete JSON|holds (an?|null)|the (val|train) split in .* has no (images|people)"
    r"|the category '.*' has the \d+ key points|has no box in the images of the set"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile_people")
    write_keypoints(folder, np.random.default_rng(0))
    return folder


@pytest.fixture
def content(root):
    return json.loads((root / "annotations/person_keypoints_train2017.json").read_text())


def load(root, split="val", **options):
    """Load a split, of which only the file of annotations is damaged, and read every sample."""
    names = {"images": "train2017", "train": "val"}
    found = CocoKeypoints(split, root=root, crop_size=(32, 24), **{**names, **options})
    samples = list(found)
    for sample in samples:
        assert sample["image"].shape == (3, 32, 24)
        for name in ("image", "keypoints", "truth", "affine", "box", "area"):
            assert torch.isfinite(sample[name]).all(), name
        assert set(sample["keypoints"][:, 2].tolist()) <= {0, 1, 2}
    return found, samples


def failure(root, split="val", **options):
    """Return the message with which the damaged file is refused, or None if every sample can be read."""
    try:
        load(root, split, **options)
    except AnnotationError as error:
        return str(error)
    return None


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(mutation=mutations())
def test_a_mutated_file_loads_or_its_error_names_the_entry(root, content, mutation):
    write_people(root, "val", damaged(content, mutation))
    for split in ("val", "train"):
        for repair in (False, True):
            error = failure(root, split, repair=repair)
            if error is not None:
                assert re.search(NAMED, error), error
                assert str(root) in error


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(mutation=mutations())
def test_mutated_boxes_load_or_their_error_names_the_entry(root, content, mutation):
    write_people(root, "val", content)
    boxes = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.5 + 0.1 * n} for n in range(4)]
    (root / "mutated.json").write_text(damaged(boxes, mutation))
    for repair in (False, True):
        error = failure(root, boxes="mutated.json", repair=repair)
        if error is not None:
            assert re.search(NAMED, error), error
            assert "mutated.json" in error


def changed(one, place, value):
    """Return the key points of a person with one number changed."""
    return {"keypoints": [value if index == place else old for index, old in enumerate(one["keypoints"])]}


FLAWS = {
    "too few": (lambda one: {"keypoints": one["keypoints"][:-3]}, "keypoints that are not 3 x 17 numbers: 48 of them"),
    "not threes": (lambda one: {"keypoints": one["keypoints"] + [1]}, "not 3 x 17 numbers: 52 of them"),
    "too many": (lambda one: {"keypoints": one["keypoints"] * 2}, "not 3 x 17 numbers: 102 of them"),
    "none": (lambda one: {"keypoints": []}, "not 3 x 17 numbers: 0 of them"),
    "a number": (lambda one: {"keypoints": 7}, "not 3 x 17 numbers: 7"),
    "a text": (lambda one: changed(one, 3, "x"), r"not 3 x 17 numbers: \["),
    "nested": (lambda one: {"keypoints": [[1, 2, 2]] * 17}, r"not 3 x 17 numbers: \[\[1, 2, 2\]"),
    "True": (lambda one: changed(one, 2, True), "not 3 x 17 numbers"),
    "huge": (lambda one: changed(one, 2, 10**400), "not 3 x 17 numbers"),
    "visibility 3": (lambda one: changed(one, 5, 3), r"a key point \(number 1\) with a visibility that is not .*: 3\."),
    "visibility NaN": (lambda one: changed(one, 8, math.nan), r"\(number 2\) with a visibility that is not .*: nan\."),
    "visibility -1": (lambda one: changed(one, 50, -1), r"\(number 16\) with a visibility that is not .*: -1\."),
    "NaN": (lambda one: changed(one, 4, math.nan), r"\(number 1\) that is not at a number of pixels: \(\d+, nan\)"),
    "infinite": (lambda one: changed(one, 0, math.inf), r"\(number 0\) that is not at a number of pixels: \(inf, "),
    "far": (lambda one: changed(one, 0, -1e30), r"that is not at a number of pixels: \(-1e\+30, "),
    "count": (lambda _: {"num_keypoints": 5}, "has a num_keypoints of 5, but 17 labeled key points"),
    "count 0": (lambda _: {"num_keypoints": 0}, "has a num_keypoints of 0, but 17 labeled"),
    "count as text": (lambda _: {"num_keypoints": "17"}, "has a num_keypoints of '17', but 17"),
    "outside": (lambda _: {"bbox": [900, 900, 20, 20]}, "has a box outside the image"),
    "partly outside": (lambda _: {"bbox": [-20, -20, 50, 50]}, r"has a box outside the image: \(-20, -20, 30, 30\)"),
    "no area": (lambda _: {"bbox": [5, 5, 0, 20]}, "has a box without area"),
    "NaN box": (lambda _: {"bbox": [5, math.nan, 10, 20]}, "has a box that is not finite"),
    "area 0": (lambda _: {"area": 0}, "has an area that is not a number of pixels above 0: 0"),
    "crowd 2": (lambda _: {"iscrowd": 2}, "has an iscrowd that is neither 0 nor 1: 2"),
}
KEPT = ("visibility 3", "visibility NaN", "visibility -1", "NaN", "infinite", "far", "count", "count 0",
        "count as text", "partly outside", "area 0")  # fmt: skip
"""Flaws after whose repair a person still has labels."""


@pytest.mark.parametrize("kind", FLAWS)
def test_a_flaw_is_refused_by_file_and_entry_or_repaired_and_counted(root, content, kind):
    change, text = FLAWS[kind]
    one = next(one for one in content["annotations"] if one["num_keypoints"] == 17)
    before = one["keypoints"]
    one.update(change(one))
    path = write_people(root, "val", content)
    named = f"annotation {one['id']} of image {one['image_id']}"
    with pytest.raises(AnnotationError, match=text) as raised:
        load(root)
    assert str(raised.value).startswith(f"{path}: {named} ")
    assert "set repair: true to" in str(raised.value)
    found, samples = load(root, repair=True)
    repaired = found.found().split("; repaired: ")[1]
    assert repaired.startswith("1 ")
    assert repaired.endswith(f"('{named}')")
    assert len(samples) == (8 if kind in KEPT else 7)
    if kind in KEPT:
        row = next(row for row in range(8) if found.index.object_ids[found.boxes.people[row]] == one["id"])
        labels = samples[row]["truth"][:, 2].tolist()
        lost = [k for k in range(17) if labels[k] == 0]
        assert len(lost) == ("key points" in repaired.split(",")[0] and "taken as unlabeled" in repaired)
        assert [label for k, label in enumerate(labels) if k not in lost] == [
            label for k, label in enumerate(before[2::3]) if k not in lost
        ]


def test_two_flaws_of_one_person_are_both_repaired(root, content):
    one = next(one for one in content["annotations"] if one["num_keypoints"] == 17)
    one["keypoints"][2], one["keypoints"][3] = 7, math.nan
    write_people(root, "val", content)
    repaired = load(root, repair=True)[0].found().split("; repaired: ")[1]
    assert "1 key points of unknown visibility, taken as unlabeled" in repaired
    assert "1 key points that are not numbers of pixels, taken as unlabeled" in repaired
    assert "num" not in repaired.replace("numbers", "")  # the stated number was right before


@pytest.mark.parametrize("values", [{"keypoints": None, "num_keypoints": 0}, {"keypoints": None}, {}])
def test_a_person_without_key_points_is_unlabeled(root, content, values):
    one = next(one for one in content["annotations"] if one["num_keypoints"] == 17)
    del one["keypoints"], one["num_keypoints"]
    one.update(values)
    write_people(root, "val", content)
    found, samples = load(root)
    assert len(samples) == 7
    assert "2 without a labeled key point" in found.found()
    unlabeled = [(sample["people"][..., 2] == 0).all(1) for sample in samples]
    assert int(torch.cat(unlabeled).sum()) == 3


def test_key_points_outside_the_image_and_without_a_label_are_taken_as_they_are(root, content):
    one = next(one for one in content["annotations"] if one["num_keypoints"] == 10)
    one["keypoints"][:3] = [-40.5, 900, 1]
    one["keypoints"][-3:] = [12, 13, 0]
    write_people(root, "val", content)
    found, samples = load(root)
    row = next(row for row in range(8) if found.index.object_ids[found.boxes.people[row]] == one["id"])
    assert samples[row]["truth"][0].tolist() == [-40.5, 900, 1]
    assert not samples[row]["truth"][-1].any()


BOX_FLAWS = {
    "no image": ({"image_id": None}, "must have an integer image_id and category_id"),
    "category as text": ({"category_id": "person"}, "must have an integer image_id and category_id"),
    "three numbers": ({"bbox": [1, 2, 3]}, r"has a bbox without area in its image of \d+ x \d+ pixels: \[1, 2, 3\]"),
    "negative side": ({"bbox": [10, 10, -5, 5]}, r"has a bbox without area .*: \[10, 10, -5, 5\]"),
    "NaN": ({"bbox": [10, math.nan, 5, 5]}, "has a bbox without area"),
    "infinite": ({"bbox": [10, 10, math.inf, 5]}, "has a bbox without area"),
    "outside": ({"bbox": [900, 10, 5, 5]}, "has a bbox without area in its image"),
    "no score": ({"score": None}, "has a score that is not a number: None"),
    "NaN score": ({"score": math.nan}, "has a score that is not a number: nan"),
    "huge score": ({"score": 10**400}, "has a score that is not a number"),
    "score as text": ({"score": "0.5"}, "has a score that is not a number: '0.5'"),
    "score True": ({"score": True}, "has a score that is not a number: True"),
}


@pytest.mark.parametrize("kind", BOX_FLAWS)
def test_a_flaw_of_a_box_is_refused_by_file_and_entry_or_repaired_and_counted(root, content, kind):
    write_people(root, "val", content)
    values, text = BOX_FLAWS[kind]
    box = {"image_id": content["images"][0]["id"], "category_id": 1, "bbox": [3, 4, 20, 30], "score": 0.5}
    path = root / "flawed.json"
    path.write_text(json.dumps([box, {**box, **values}]))
    with pytest.raises(AnnotationError, match=text) as raised:
        load(root, boxes="flawed.json")
    assert str(raised.value).startswith(f"{path}: box 1")
    found, _ = load(root, boxes="flawed.json", repair=True)
    assert np.isfinite(found.boxes.scores).sum() == 1
    assert "; repaired: 1 boxes" in found.found()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("[{", "is not complete JSON"),
        ("{}", "holds an object where COCO's form of results has a list of boxes"),
        ("3", "holds a number where"),
        ("[]", "has no box in the images of the set"),
        ("[7]", "box 0 must have an integer image_id"),
    ],
)
def test_a_file_of_boxes_of_another_form_is_refused_by_name(root, content, text, message):
    write_people(root, "val", content)
    (root / "other.json").write_text(text)
    with pytest.raises(AnnotationError, match=message) as raised:
        load(root, boxes="other.json")
    assert str(root / "other.json") in str(raised.value)
