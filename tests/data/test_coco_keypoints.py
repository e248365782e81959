"""People with key points from files in COCO's form: samples, boxes of a detector, other skeletons, refused options."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from made_poses import write_keypoints, write_people
from PIL import Image

from tolerances import FLOAT32, close
from widefield import data
from widefield.data import AnnotationError, CocoKeypoints, coco_keypoints, crops, decoding


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    write_keypoints(folder, np.random.default_rng(0))
    return folder


@pytest.fixture
def content(root):
    return json.loads((root / "annotations/person_keypoints_val2017.json").read_text())


def people(content, image):
    """Return the annotations of an image by place, in the order of the file."""
    return [one for one in content["annotations"] if one["image_id"] == content["images"][image]["id"]]


def test_each_labeled_person_has_a_crop(root, content):
    val = CocoKeypoints("val", root=root, crop_size=(64, 48), names=True)
    assert len(val) == 8  # nine people, of whom one has no label; a crowd region
    samples = list(val)
    expected = [
        one
        for image in range(4)
        for one in people(content, image)
        if not one["iscrowd"] and any(one["keypoints"][2::3])
    ]
    for index, (sample, one) in enumerate(zip(samples, expected, strict=True)):
        image = next(image for image in content["images"] if image["id"] == one["image_id"])
        assert val.image_id(index) == one["image_id"]
        assert content["images"][int(sample["image_id"])] is image
        assert sample["name"] == f"val2017/{image['file_name']}"
        assert sample["size"].tolist() == [image["height"], image["width"]]
        assert torch.equal(sample["truth"], torch.tensor(one["keypoints"]).float().reshape(17, 3))
        x, y, width, height = one["bbox"]
        last = torch.tensor([image["width"] - 1, image["height"] - 1] * 2)
        close(sample["box"], torch.minimum(torch.tensor([x, y, x + width, y + height]), last), FLOAT32)
        assert float(sample["area"]) == np.float32(one["area"])
        assert (int(sample["label"]), float(sample["box_score"])) == (0, 1)
        matrix = crops.crop_matrix(*crops.crop_box(sample["box"], (64, 48)), (64, 48))
        assert torch.equal(sample["affine"], matrix)
        labeled = sample["truth"][:, 2] > 0
        moved = crops.apply_matrix(sample["truth"][labeled, :2], matrix)
        close(sample["keypoints"][labeled, :2], moved, FLOAT32)
        assert torch.equal(sample["keypoints"][:, 2], sample["truth"][:, 2])
        assert not sample["keypoints"][~labeled].any()
        pixels = torch.from_numpy(np.asarray(Image.open(root / sample["name"])).copy()).permute(2, 0, 1)
        mean, std = (torch.tensor(values)[:, None, None] for values in (val.mean, val.std))
        shown = (crops.warp(pixels, matrix[None], (64, 48))[0] / 255 - mean) / std
        close(sample["image"], shown, FLOAT32)


def test_val_samples_bring_all_people_of_their_file_once(root, content):
    seen = {}
    for sample in CocoKeypoints("val", root=root, crop_size=(64, 48)):
        file = int(sample["image_id"])
        if file in seen:
            assert sample["people"].shape == (0, 17, 3)
            assert sample["people_crowd"].shape == (0,)
        seen.setdefault(file, sample)
    assert sorted(seen) == [0, 1, 2]
    for file, sample in seen.items():
        expected = people(content, file)
        points = torch.tensor([one["keypoints"] for one in expected]).float().reshape(-1, 17, 3)
        assert torch.equal(sample["people"], points)
        assert sample["people_crowd"].tolist() == [one["iscrowd"] == 1 for one in expected]
        close(sample["people_area"], torch.tensor([one["area"] for one in expected]), FLOAT32)
        x, y, width, height = torch.tensor([one["bbox"] for one in expected]).unbind(1)
        close(sample["people_boxes"], torch.stack([x, y, x + width, y + height], 1), FLOAT32)
        assert sample["people_labels"].tolist() == [0] * len(expected)
    assert [int(one["people_crowd"].sum()) for one in seen.values()] == [1, 0, 0]
    unlabeled = [int((one["people"][..., 2] == 0).all(1).sum()) for one in seen.values()]
    assert unlabeled == [1, 1, 0]  # the crowd region, and a person


def test_what_was_read_and_left_out_is_reported(root):
    train, val = data.create_both("coco_keypoints", root=root)
    assert train.classes == val.classes == ("person",)
    assert train.image_shape == (3, 256, 192)
    assert val.found().startswith("val: 8 people in 3 images in ")
    assert "17 key points, 1 class; left out: 1 crowd regions ('" in val.found()
    assert "1 without a labeled key point ('" in val.found()
    assert train.found().startswith("train: 8 people in 3 images in ")


def test_fingerprints_change_with_every_label(root, tmp_path, content):
    def fingerprint(**options):
        return CocoKeypoints("val", root=root, annotations=str(tmp_path / "changed.json"), **options).fingerprint()

    def written(changed):
        (tmp_path / "changed.json").write_text(json.dumps(changed))
        return fingerprint()

    prints = {written(content)}
    assert written(copy.deepcopy(content)) in prints
    for change in (
        lambda one: one["keypoints"].__setitem__(0, one["keypoints"][0] + 1),
        lambda one: one["keypoints"].__setitem__(2, 3 - one["keypoints"][2]),
        lambda one: one["bbox"].__setitem__(2, one["bbox"][2] - 1),
        lambda one: one.__setitem__("area", one["area"] + 1),
        lambda one: one.__setitem__("iscrowd", 1),
    ):
        changed = copy.deepcopy(content)
        change(next(one for one in changed["annotations"] if one["num_keypoints"] == 17))
        prints.add(written(changed))
    assert len(prints) == 6
    written(content)
    assert fingerprint(boxes=str(root / "boxes.json")) not in prints
    assert fingerprint(crop_size=(64, 48)) in prints


def test_boxes_of_a_detector_replace_the_true_ones(root, content):
    val = CocoKeypoints("val", root=root, crop_size=(64, 48), boxes="boxes.json")
    boxes = json.loads((root / "boxes.json").read_text())
    samples = list(val)
    scored = [sample for sample in samples if torch.isfinite(sample["box_score"])]
    assert len(scored) == len(boxes) == 7  # images 0 and 2, with the crowd region
    ids = [image["id"] for image in content["images"]]
    for sample, one in zip(scored, sorted(boxes, key=lambda one: ids.index(one["image_id"])), strict=True):
        assert int(sample["image_id"]) == ids.index(one["image_id"])
        x, y, width, height = one["bbox"]
        close(sample["box"], torch.tensor([x, y, x + width, y + height]), FLOAT32)
        close(sample["area"], torch.tensor(width * height), FLOAT32)
        assert float(sample["box_score"]) == np.float32(one["score"])
        assert not sample["truth"].any()
        assert not sample["keypoints"].any()
    (empty,) = [sample for sample in samples if not torch.isfinite(sample["box_score"])]
    assert int(empty["image_id"]) == 1  # people, and no box
    height, width = empty["size"].tolist()
    assert empty["box"].tolist() == [0, 0, width, height]
    assert len(empty["people"]) == 3
    assert sum(len(sample["people"]) for sample in samples) == 10
    assert val.found().startswith("val: 7 boxes of a detector in ")


def test_weak_boxes_and_those_of_others_are_left_out(root, tmp_path, content):
    first, second = (image["id"] for image in content["images"][:2])
    box = {"image_id": first, "category_id": 1, "bbox": [-4, 3, 200, 30], "score": 0.5}
    changes = [{}, {"score": 0.2}, {"image_id": 77}, {"category_id": 3}, {"image_id": second}, {"bbox": [1, 1, 9, 9]}]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps([{**box, **change} for change in changes]))
    val = CocoKeypoints("val", root=root, boxes=str(path), min_score=0.3)
    scores = val.boxes.scores
    assert val.boxes.files.tolist() == [0, 0, 1, 2]
    assert np.isfinite(scores).tolist() == [True, True, True, False]
    assert val.boxes.boxes[0].tolist() == [-4, 3, 196, 33]  # a detector's boxes may leave the image
    for number, reason in enumerate(("below min_score", "of other images", "of other categories"), start=1):
        assert f"1 boxes {reason} ('box {number} of image" in val.found()
    with pytest.raises(AnnotationError, match=r"boxes\.json has no box in .*Left out: 4 boxes below"):
        CocoKeypoints("val", root=root, boxes=str(path), min_score=0.9)
    with pytest.raises(FileNotFoundError, match=r"no file of boxes .*none\.json"):
        CocoKeypoints("val", root=root, boxes="none.json")
    assert len(CocoKeypoints("train", root=root, boxes="none.json")) == 8  # an option of val


def cranes(content):
    """Return the content as that of another animal with two key points, next to people without any."""
    changed = copy.deepcopy(content)
    changed["categories"] = [
        {"id": 1, "name": "person"},
        {"id": 5, "name": "crane", "keypoints": ["Left Wing", "right-wing"]},
    ]
    for number, one in enumerate(changed["annotations"]):
        one["category_id"] = 5 if number % 2 else 1
        one["keypoints"] = [10.25, 20, 2, 30, 40, 1]
        one["num_keypoints"] = 2
    return changed


def test_any_skeleton_and_category_can_be_read(root, tmp_path, content):
    changed = cranes(content)
    (tmp_path / "cranes.json").write_text(json.dumps(changed))
    skeleton = tmp_path / "crane.yaml"
    skeleton.write_text("names: [left_wing, right_wing]\nswap: [[left_wing, right_wing]]\nsigmas: 0.1\n")
    options = {"root": root, "annotations": str(tmp_path / "cranes.json"), "skeleton": str(skeleton)}
    val = CocoKeypoints("val", **options)
    assert val.classes == ("crane",)
    assert val.skeleton.sigmas == (0.1, 0.1)
    birds = sum(one["category_id"] == 5 and not one["iscrowd"] for one in changed["annotations"])
    assert len(val) == birds
    assert val[0]["truth"].tolist() == [[10.25, 20, 2], [30, 40, 1]]
    assert "objects of other categories" in val.found()
    both = CocoKeypoints("val", categories=["crane", "person"], **options)
    assert both.classes == ("crane", "person")
    assert {int(sample["label"]) for sample in both} == {0, 1}
    with pytest.raises(AnnotationError, match=r"category 'crane' has the 2 key points .*the 17 key points .*skeleton"):
        CocoKeypoints("val", root=root, annotations=str(tmp_path / "cranes.json"))


def test_a_file_without_key_points_has_no_people_to_train_on(root, tmp_path, content):
    for one in content["annotations"]:
        del one["keypoints"], one["num_keypoints"]
    (tmp_path / "boxes_only.json").write_text(json.dumps(content))
    with pytest.raises(
        AnnotationError, match=r"no people with a labeled key point\. Left out: 1 crowd regions.*9 without"
    ):
        CocoKeypoints("val", root=root, annotations=str(tmp_path / "boxes_only.json"))
    found = CocoKeypoints(
        "val", root=root, annotations=str(tmp_path / "boxes_only.json"), boxes=str(root / "boxes.json")
    )
    assert len(found) == 7
    assert sum(len(sample["people"]) for sample in found) == 7
    assert not any(sample["people"].any() for sample in found)


def test_train_crops_are_augmented_and_reproducible(root):
    train = CocoKeypoints("train", root=root, crop_size=(64, 48))
    plain = CocoKeypoints("train", root=root, crop_size=(64, 48), augment=False)
    first, copied = train[2], pickle.loads(pickle.dumps(train))
    assert torch.equal(copied[2]["image"], first["image"])
    assert torch.equal(plain[2]["truth"], first["truth"])
    assert not torch.equal(plain[2]["affine"], first["affine"])
    assert "people" not in first
    train.set_epoch(1)
    assert not torch.equal(train[2]["affine"], first["affine"])


def test_people_of_one_image_are_read_from_one_decoding(root, monkeypatch):
    val = CocoKeypoints("val", root=root, crop_size=(64, 48))
    alone = [val[index]["image"] for index in reversed(range(len(val)))][::-1]
    reads = []

    def counted(path, **options):
        reads.append(path)
        return decoding.read(path, **options)

    monkeypatch.setattr(coco_keypoints, "read", counted)
    val = CocoKeypoints("val", root=root, crop_size=(64, 48))
    for image, sample in zip(alone, val, strict=True):
        assert torch.equal(image, sample["image"])
    assert len(reads) == len(set(reads)) == 3


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"repair": "yes"}, TypeError, "repair must be True or False; got 'yes'"),
        ({"categories": "person"}, TypeError, "categories must be a list of names"),
        ({"categories": ["persons"]}, ValueError, "has no category 'persons'. Did you mean 'person'"),
        ({"skeleton": "cocoa"}, FileNotFoundError, "no skeleton 'cocoa'.*Did you mean 'coco'"),
        (
            {"annotations": "none.json"},
            FileNotFoundError,
            "no file of annotations .*none.json.*person_keypoints_{split}",
        ),
        ({"boxes": 3}, TypeError, "boxes must be a path"),
        ({"min_score": 2}, ValueError, "min_score must be from 0.0 to 1; got 2"),
        ({"corrupt": "no"}, ValueError, "corrupt must be one of"),
        ({"crop": 3}, TypeError, "has no argument 'crop'"),
    ],
)
def test_wrong_options_are_refused_by_name(root, options, error, text):
    with pytest.raises(error, match=text):
        CocoKeypoints("val", root=root, **options)


def test_corrupt_and_rotated_images_are_treated_as_in_other_sets(tmp_path):
    content = write_keypoints(tmp_path, np.random.default_rng(1))["val"]
    image = content["images"][0]
    path = tmp_path / "val2017" / image["file_name"]
    intact = path.read_bytes()
    path.write_bytes(intact[:500])
    with pytest.raises(data.CorruptImageError, match=path.name):
        CocoKeypoints("val", root=tmp_path)[0]
    skipping = CocoKeypoints("val", root=tmp_path, corrupt="skip", max_corrupt=0.5)
    with pytest.warns(UserWarning, match="It is left out"):
        assert skipping[0] is None
    assert skipping[1] is None  # the second person of this image, without another warning
    path.write_bytes(intact)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)
    with pytest.raises(AnnotationError, match="set exif_orientation: false"):
        CocoKeypoints("val", root=tmp_path)[0]
    assert CocoKeypoints("val", root=tmp_path, exif_orientation=False, crop_size=32)[0]["image"].shape == (3, 32, 32)
    with pytest.raises(data.UnsupportedImageError, match="more than max_pixels=100"):
        CocoKeypoints("val", root=tmp_path, max_pixels=100)[1]


def test_true_boxes_end_at_the_last_pixels(tmp_path):
    content = write_keypoints(tmp_path, np.random.default_rng(2))["val"]
    image = content["images"][0]
    one = people(content, 0)[0]
    one.update(bbox=[0, 0, image["width"], image["height"]], iscrowd=0)
    write_people(tmp_path, "val", content)
    val = CocoKeypoints("val", root=tmp_path)
    row = next(i for i in range(len(val)) if int(val.index.object_ids[val.boxes.people[i]]) == one["id"])
    assert val[row]["box"].tolist() == [0, 0, image["width"] - 1, image["height"] - 1]  # as mmpose cuts it
    assert val.index.boxes[val.boxes.people[row]].tolist() == [0, 0, image["width"], image["height"]]
