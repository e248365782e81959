"""Sets in COCO's form, compared with pycocotools, and LVIS."""

import json
import pickle

import numpy as np
import pytest
import torch
from made_objects import CLASSES, IDS, coco_content, write_coco, write_image, write_json
from pycocotools.coco import COCO

from tolerances import FLOAT32, close
from widefield import data

# NumPy 2 deprecates how pycocotools 2.0.11 makes arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder)
    return folder


@pytest.mark.parametrize("split", ["train", "val"])
def test_objects_are_those_that_pycocotools_reads(root, split, capsys):
    reference = COCO(root / f"annotations/instances_{split}2017.json")
    found = data.create("coco", split, root=root, masks=True, scale=None, hflip=0)
    assert found.classes == found.object_classes == CLASSES
    crowds = 0
    for index, image in enumerate(reference.loadImgs(reference.getImgIds())):
        sample, expected = found[index], reference.loadAnns(reference.getAnnIds(imgIds=[image["id"]]))
        assert found.image_id(index) == image["id"]
        assert found.name(index).endswith(image["file_name"])
        size = (image["height"], image["width"])
        assert sample["image"].shape == (3, *size)
        assert sample["size"].tolist() == list(size)
        assert sample["labels"].tolist() == [IDS.index(one["category_id"]) for one in expected]
        assert sample["crowd"].tolist() == [bool(one["iscrowd"]) for one in expected]
        masks = np.array([reference.annToMask(one) for one in expected], bool).reshape(-1, *size)
        np.testing.assert_array_equal(sample["masks"].numpy(), masks)
        boxes = np.array([one["bbox"] for one in expected], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        close(sample["boxes"], torch.from_numpy(boxes).float(), FLOAT32)
        area = masks.sum((1, 2)) if split == "train" else [one["area"] for one in expected]
        close(sample["area"], torch.tensor(area, dtype=torch.float32), FLOAT32)
        crowds += int(sample["crowd"].sum())
    assert crowds == 1
    assert len(sample["labels"]) == 0  # the last image has no objects
    kinds = {name: (value.dtype, value.shape[1:]) for name, value in sample.items() if name not in ("image", "masks")}
    assert kinds == {
        "boxes": (torch.float32, (4,)),
        "labels": (torch.int64, ()),
        "crowd": (torch.bool, ()),
        "area": (torch.float32, ()),
        "size": (torch.int64, ()),
    }


def test_images_come_in_the_order_of_their_ids(tmp_path):
    """COCO's own files are not sorted; pycocotools is, and which of two equal scores comes first changes AP."""
    content = write_coco(tmp_path)["val"]
    content["images"].reverse()
    write_json(tmp_path, "val", content)
    found = data.create("coco", "val", root=tmp_path, scale=None)
    ids = [found.image_id(index) for index in range(len(found))]
    assert ids == sorted(ids)
    stated = {one["id"]: [one["height"], one["width"]] for one in content["images"]}
    assert [sample["size"].tolist() for sample in found] == [stated[identity] for identity in ids]


def test_val_images_are_resized_and_their_objects_are_not(root):
    plain = data.create("coco", "val", root=root, masks=True, scale=None)
    resized = data.create("coco", "val", root=root, masks=True, scale=(133, 80))
    assert resized.test_scale == (133, 80)
    for one, other in zip(plain, resized, strict=True):
        height, width = one["size"].tolist()
        factor = min(133 / max(height, width), 80 / min(height, width))
        assert other["image"].shape == (3, int(height * factor + 0.5), int(width * factor + 0.5))
        for name in ("boxes", "masks", "labels", "area", "size"):
            assert torch.equal(one[name], other[name])


def test_a_segment_of_several_polygons_is_their_union(root, tmp_path):
    content = write_coco(tmp_path)["val"]
    image = content["images"][0]
    first, second, *_ = [one for one in content["annotations"] if one["image_id"] == image["id"] and not one["iscrowd"]]
    first["segmentation"] += second["segmentation"]
    first["bbox"] = [0, 0, image["width"], image["height"]]
    write_json(tmp_path, "val", content)
    sample = data.create("coco", "val", root=tmp_path, masks=True)[0]
    expected = COCO(tmp_path / "annotations/instances_val2017.json").annToMask(first)
    assert (sample["masks"].numpy() == expected.astype(bool)).all((1, 2)).any()


def test_categories_choose_classes_and_their_order(root):
    found = data.create("coco", "val", root=root, categories=["car", "person"])
    whole = data.create("coco", "val", root=root)
    assert found.classes == ("car", "person")
    labels = [[("car", None, "person").index(name) for name in names if name != "bicycle"]
              for names in ([CLASSES[label] for label in sample["labels"]] for sample in whole)]  # fmt: skip
    assert [[0 if label == 0 else 2 for label in sample["labels"].tolist()] for sample in found] == labels
    assert "objects of other categories" in found.found()
    with pytest.raises(ValueError, match="has no category 'bike'"):
        data.create("coco", "val", root=root, categories=["bike"])


def test_any_folder_and_file_can_be_read(tmp_path):
    rng = np.random.default_rng(0)
    for split, first in (("train", 1), ("valid", 900)):
        content = coco_content(rng, first=first)
        for image in content["images"]:
            write_image(tmp_path / split / image["file_name"], image["height"], image["width"], rng)
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content))
    train, val = data.create_both(
        "coco", root=str(tmp_path), annotations="{split}/_annotations.coco.json", images="{split}", val="valid"
    )
    assert (len(train), len(val)) == (4, 4)
    assert train.found() == f"train: 4 images in {tmp_path}, 3 classes, 10 objects (1 image without)"
    assert train.fingerprint() != val.fingerprint()


def test_images_without_objects_and_small_ones_are_left_out_of_train_if_asked(root):
    train, val = data.create_both("coco", root=root, filter_empty=True)
    assert (len(train), len(val)) == (3, 3)
    assert "left out: 1 images without objects" in train.found()
    sides = [min(sample["size"]) for sample in data.create("coco", "train", root=root)]
    found = data.create("coco", "train", root=root, min_image_size=int(max(sides)))
    assert len(found) == sum(side == max(sides) for side in sides)
    with pytest.raises(data.AnnotationError, match=r"has no images\. Left out: 4 images below min_image_size"):
        data.create("coco", "train", root=root, min_image_size=1000)


def test_train_images_are_grouped_by_shape_unless_it_is_off(root):
    found = data.create("coco", "train", root=root)
    tall = [height > width for height, width in (sample["size"].tolist() for sample in found)]
    assert found.batch_groups().tolist() == [int(one) for one in tall]
    assert 0 < sum(tall) < len(tall)
    assert data.create("coco", "train", root=root, group_by_shape=False).batch_groups() is None
    assert data.create("coco", "train", root=root, pipeline="large_scale_jitter").batch_groups() is None
    assert data.create("coco", "val", root=root).batch_groups() is None


def test_a_set_is_small_and_reaches_workers_whole(root):
    found = data.create("coco", "train", root=root, masks=True, pipeline="multi_scale_crop", scale=(120, 64))
    copied = pickle.loads(pickle.dumps(found))
    for one, other in zip(found, copied, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    kinds = {type(value) for value in vars(found.index).values()} - {type(found.index.outlines), type(None)}
    assert kinds == {np.ndarray}
    assert {type(value) for value in vars(found.index.outlines).values()} == {np.ndarray}


def test_annotations_without_area_have_that_of_their_box(root, tmp_path):
    content = write_coco(tmp_path)["val"]
    for one in content["annotations"]:
        del one["area"]
    write_json(tmp_path, "val", content)
    sample = data.create("coco", "val", root=tmp_path)[0]
    box = sample["boxes"]
    close(sample["area"], (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]), FLOAT32)


def test_boxes_may_pass_the_border_by_a_pixel(tmp_path):
    content = write_coco(tmp_path)
    for split, images in content.items():
        image, one = images["images"][0], images["annotations"][0]
        one.update(image_id=image["id"], bbox=[-0.5, -1, image["width"] + 1, image["height"] + 1.9])
        write_json(tmp_path, split, images)
    train, val = data.create_both("coco", root=tmp_path, scale=None, hflip=0)
    height, width = val[0]["size"].tolist()
    assert [-0.5, -1.0, width + 0.5, height + 0.9] in [[round(v, 4) for v in box] for box in val[0]["boxes"].tolist()]
    assert [0.0, 0.0, *train[0]["size"].tolist()[::-1]] in train[0]["boxes"].tolist()


def write_lvis(root):
    rng = np.random.default_rng(0)
    made = {}
    for split, first in (("train", 1), ("val", 300)):
        content = coco_content(rng, first=first)
        content["categories"] = [{"id": i + 1, "name": f"class {i}"} for i in range(1203)]
        for image in content["images"]:
            name = image.pop("file_name")
            image["coco_url"] = f"http://images.cocodataset.org/train2017/{name}"
            image["not_exhaustive_category_ids"] = rng.choice(1203, 2, replace=False).tolist()
            image["neg_category_ids"] = [1203]
            image["not_exhaustive_category_ids"] = [i + 1 for i in image["not_exhaustive_category_ids"]]
            write_image(root / "train2017" / name, image["height"], image["width"], rng)
        for one in content["annotations"]:
            del one["iscrowd"]
        (root / f"lvis_v1_{split}.json").write_text(json.dumps(content))
        made[split] = content
    return made


def test_lvis_has_1203_classes_and_lists_for_each_image(tmp_path):
    made = write_lvis(tmp_path)
    train, val = data.create_both("lvis", root=tmp_path, masks=True)
    assert len(train.classes) == len(train.palette) == 1203
    for sample, image in zip(val, made["val"]["images"], strict=True):
        assert sample["not_exhaustive"].tolist() == [i - 1 for i in image["not_exhaustive_category_ids"]]
        assert sample["negative"].tolist() == [1202]
        assert not sample["crowd"].any()
    assert train.name(0) == str(tmp_path / "train2017" / "000000000001.png")
