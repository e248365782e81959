"""The published segmentation sets in their exact layouts, and what all sets of label files share."""

import pickle
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from made_segmentation import write_ade20k, write_cityscapes, write_coco_stuff, write_labels, write_masks, write_voc
from PIL import Image
from torch.utils.data import DataLoader

from tolerances import FLOAT32, close
from widefield.data import (
    SETS,
    Ade20k,
    Cityscapes,
    CocoStuff,
    CorruptImageError,
    CorruptImagesError,
    LabelError,
    Masks,
    SegmentationSet,
    Voc,
    create_both,
    summarize,
)
from widefield.data.coco_stuff import published_values

THREE = ("sky", "sea", "ship")
SETS_OF_LABELS = {
    "ade20k": (Ade20k, write_ade20k, {}, {}),
    "cityscapes": (Cityscapes, write_cityscapes, {}, {}),
    "cityscapes converted": (Cityscapes, write_cityscapes, {"train_ids": True}, {}),
    "voc": (Voc, write_voc, {}, {}),
    "voc with SBD": (Voc, write_voc, {"augmented": 3}, {"augmented": True}),
    "coco_stuff": (CocoStuff, write_coco_stuff, {}, {}),
    "coco_stuff converted": (CocoStuff, write_coco_stuff, {"converted": True}, {}),
    "masks": (Masks, write_masks, {}, {"classes": THREE}),
}


@pytest.fixture(params=SETS_OF_LABELS)
def kind(request):
    return SETS_OF_LABELS[request.param]


@pytest.fixture
def made(kind, tmp_path):
    """Return a function that builds a split of each set, and the masks it must read."""
    make, write, written, needed = kind
    masks = write(tmp_path, **written)
    return (lambda split, **options: make(split, root=tmp_path, **{**needed, **options})), masks


def test_each_set_reads_the_masks_of_its_layout(made):
    make, masks = made
    for split in ("train", "val"):
        data = make(split, size=16)
        assert len(data) == len(masks[split])
    for index, expected in enumerate(masks["val"]):
        sample = data[index]
        assert sample["mask"].dtype == torch.int64
        assert torch.equal(sample["mask"], torch.from_numpy(expected).long())
        assert sample["image"].dtype == torch.float32


def test_train_samples_have_the_size_of_the_crop(made):
    make, masks = made
    data = make("train", size=(24, 40), scale=(80, 60))
    assert data.crop_size == (24, 40)
    assert data.image_shape == (3, 24, 40)
    known = {int(value) for mask in masks["train"] for value in np.unique(mask)} | {255}
    for sample in data:
        assert sample["image"].shape == (3, 24, 40)
        assert sample["mask"].shape == (24, 40)
        assert {int(value) for value in sample["mask"].unique()} <= known
        assert sample["mask"].max() == 255 or sample["mask"].max() < len(data.classes)


def test_train_masks_come_from_their_own_images(made):
    make, masks = made
    data = make("train", size=(128, 256), scale=None, ratio=(1, 1), hflip=0, photometric=False)
    for sample, expected in zip(data, masks["train"], strict=True):
        height, width = expected.shape
        assert torch.equal(sample["mask"][:height, :width], torch.from_numpy(expected).long())
        assert (sample["mask"][height:] == 255).all()
        assert not sample["image"][:, :, width:].any()


@pytest.mark.parametrize(
    ("make", "count", "first", "last", "color"),
    [
        (Ade20k, 150, "wall", "flag", (120, 120, 120)),
        (Cityscapes, 19, "road", "bicycle", (128, 64, 128)),
        (Voc, 21, "background", "tvmonitor", (0, 0, 0)),
        (CocoStuff, 171, "person", "wood", (128, 0, 0)),
    ],
)
def test_classes_and_palettes_are_the_official_ones(tmp_path, make, count, first, last, color):
    write = next(write for other, write, *_ in SETS_OF_LABELS.values() if other is make)
    write(tmp_path)
    data = make("val", root=tmp_path)
    assert (len(data.classes), data.classes[0], data.classes[-1]) == (count, first, last)
    assert (len(data.palette), data.palette[0]) == (count, color)
    assert len(set(data.classes)) == count
    assert all(0 <= value <= 255 for color in data.palette for value in color)
    assert isinstance(data, SegmentationSet)
    assert data.ignore_index == 255
    assert data.size_groups == ()


def test_single_classes_are_at_their_published_places(tmp_path):
    for write in (write_ade20k, write_cityscapes, write_voc, write_coco_stuff):
        write(tmp_path / write.__name__)

    def names(make, write):
        return make("val", root=tmp_path / write.__name__).classes

    # https://github.com/CSAILVision/sceneparsing objectInfo150 (from 1), cityscapesScripts labels.py (trainId),
    # the development kit of VOC 2012, and COCO-Stuff's labels.txt without its unused ids.
    ade = names(Ade20k, write_ade20k)
    assert [ade[i] for i in (12, 20, 76, 127, 136)] == ["person", "car", "boat", "bicycle", "traffic light"]
    city = names(Cityscapes, write_cityscapes)
    assert [city[i] for i in (10, 11, 13, 16)] == ["sky", "person", "car", "train"]
    voc = names(Voc, write_voc)
    assert [voc[i] for i in (7, 12, 15)] == ["car", "dog", "person"]
    stuff = names(CocoStuff, write_coco_stuff)
    ids = {3: "car", 90: "toothbrush", 92: "banner", 124: "grass", 157: "sky-other", 169: "tree", 182: "wood"}
    assert {id: stuff[published_values()[id - 1]] for id in ids} == ids


def test_val_images_are_resized_and_masks_are_not(tmp_path):
    masks = write_masks(tmp_path)
    data = Masks("val", root=tmp_path, classes=THREE, test_scale=(200, 100))
    for sample, expected in zip(data, masks["val"], strict=True):
        height, width = expected.shape
        factor = min(200 / width, 100 / height)
        assert sample["image"].shape[1:] == (int(height * factor + 0.5), int(width * factor + 0.5))
        assert sample["mask"].shape == (height, width)
    # Published sets are tested at the scale of their training.
    write_ade20k(tmp_path / "ade")
    assert min(Ade20k("val", root=tmp_path / "ade")[0]["image"].shape[1:]) == 512
    assert min(Ade20k("val", root=tmp_path / "ade", test_scale=(640, 64))[0]["image"].shape[1:]) == 64
    plain = Masks("val", root=tmp_path, classes=THREE)[0]
    assert plain["image"].shape[1:] == plain["mask"].shape


def test_images_are_normalized(tmp_path):
    write_masks(tmp_path)
    data = Masks("val", root=tmp_path, classes=THREE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    with Image.open(data.name(0)) as picture:
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    close(data[0]["image"], (pixels - mean) / std, FLOAT32)


def test_samples_depend_on_seed_epoch_and_index_alone(tmp_path):
    write_masks(tmp_path, counts={"train": 6, "val": 1})
    data = Masks("train", root=tmp_path, classes=THREE, size=16, seed=3)
    first = [sample["image"] for sample in data]
    loader = DataLoader(data, batch_size=None, num_workers=2)
    assert all(torch.equal(a, b["image"]) for a, b in zip(first, loader, strict=True))
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[4]["image"], first[4])  # alone, as after a resume
    data.set_epoch(1)
    assert not torch.equal(data[4]["image"], first[4])
    assert not torch.equal(Masks("train", root=tmp_path, classes=THREE, size=16, seed=4)[4]["image"], first[4])


def test_both_splits_are_created_by_name(tmp_path):
    write_ade20k(tmp_path)
    train, val = create_both("ade20k", root=tmp_path, size=32, scale=(64, 32))
    lines = summarize(train, val).splitlines()
    assert lines == [
        f"train: 4 images in {tmp_path}, 150 classes",
        f"val: 2 images in {tmp_path}, 150 classes",
    ]
    assert {"ade20k", "cityscapes", "voc", "coco_stuff", "masks"} <= set(SETS)


def test_published_sets_are_found_in_the_folder_that_holds_them(tmp_path):
    write_ade20k(tmp_path / "ADEChallengeData2016")
    write_voc(tmp_path / "VOCdevkit" / "VOC2012")
    assert len(Ade20k("val", root=tmp_path)) == 2
    assert len(Voc("val", root=tmp_path)) == len(Voc("val", root=tmp_path / "VOCdevkit")) == 2


def test_the_fingerprint_depends_on_names_and_classes_and_not_on_the_place(tmp_path):
    write_masks(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def fingerprint(root, classes=THREE, split="val"):
        return Masks(split, root=tmp_path / root, classes=classes).fingerprint()

    assert fingerprint("a") == fingerprint("b")
    assert fingerprint("a") != fingerprint("a", split="train")
    assert fingerprint("a") != fingerprint("a", ("sea", "sky", "ship"))
    for kind, ending in (("images", ".jpg"), ("masks", ".png")):
        path = tmp_path / "b" / kind / "val" / "1" / f"val1{ending}"
        path.rename(path.with_stem("other"))
    assert fingerprint("a") != fingerprint("b")


def test_samples_carry_their_names_if_asked(tmp_path):
    write_masks(tmp_path)
    data = Masks("val", root=tmp_path, classes=THREE, names=True)
    assert [sample["name"] for sample in data] == ["images/val/0/val0.jpg", "images/val/1/val1.jpg"]
    assert data.label_name(1) == str(tmp_path / "masks/val/1/val1.png")


# What is wrong with the files


def test_missing_label_images_are_listed(made, request):
    make, _ = made
    if request.node.callspec.params["kind"] == "cityscapes converted":
        return  # the published label images are read instead: see below
    lost = Path(make("val").label_name(0))
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 (images have no label image|label images are missing)") as e:
        make("val")
    assert str(lost) in str(e.value)


def test_converted_label_images_of_cityscapes_are_read_only_if_none_is_missing(tmp_path):
    masks = write_cityscapes(tmp_path, train_ids=True)
    assert Cityscapes("val", root=tmp_path).label_name(0).endswith("_gtFine_labelTrainIds.png")
    Path(Cityscapes("val", root=tmp_path).label_name(1)).unlink()
    data = Cityscapes("val", root=tmp_path)
    assert data.label_name(0).endswith("_gtFine_labelIds.png")
    assert torch.equal(data[0]["mask"], torch.from_numpy(masks["val"][0]).long())


def test_label_images_without_an_image_are_reported(tmp_path):
    write_ade20k(tmp_path)
    write_labels(tmp_path / "annotations/validation/ADE_val_00000099.png", np.ones((4, 4), dtype=np.uint8))
    found = Ade20k("val", root=tmp_path).found()
    assert "2 images" in found
    assert "1 label images without an image ('" in found
    assert "ADE_val_00000099.png" in found


def test_a_label_image_of_another_size_is_refused_with_the_mend(made):
    make, _ = made
    data = make("val")
    height, width = data[0]["mask"].shape
    with Image.open(data.label_name(0)) as picture:
        picture.crop((0, 0, width, height - 1)).save(data.label_name(0))
    with pytest.raises(LabelError, match=f"{width} x {height - 1} pixels.*is {width} x {height}") as e:
        make("val")[0]
    assert data.label_name(0) in str(e.value)
    assert data.name(0) in str(e.value)
    assert "at the size of the image" in str(e.value)


@pytest.mark.parametrize(
    ("make", "write", "value", "text"),
    [
        (Ade20k, write_ade20k, 151, r"class: 151 \(.*Values of classes: 1 to 150; ignored: 0, 255\. Take the label"),
        (
            Cityscapes,
            write_cityscapes,
            34,
            r"class: 34 \(.*Values of classes: 7 to 8, 11 to 13, 17, 19 to 28, 31 to 33",
        ),
        (Voc, write_voc, 21, r"class: 21 \(.*Values of classes: 0 to 20; ignored: 255"),
        (CocoStuff, write_coco_stuff, 11, r"class: 11 \(.*Values of classes: 0 to 10, 12 to 24"),
    ],
)
def test_values_outside_the_classes_are_refused_by_name(tmp_path, make, write, value, text):
    write(tmp_path)
    data = make("val", root=tmp_path)
    labels = np.full(tuple(data[1]["mask"].shape), value, dtype=np.uint8)
    write_labels(Path(data.label_name(1)), labels)
    with pytest.raises(LabelError, match=text) as e:
        data[1]
    assert f"the label image {data.label_name(1)} has values that stand for no class" in str(e.value)


def test_corrupt_files_are_refused_or_skipped_like_other_images(tmp_path):
    write_masks(tmp_path, counts={"train": 1, "val": 8})
    data = Masks("val", root=tmp_path, classes=THREE)
    for path in (data.name(1), data.label_name(2)):
        Path(path).write_bytes(Path(path).read_bytes()[:100])
    for index, path in ((1, data.name(1)), (2, data.label_name(2))):
        with pytest.raises(CorruptImageError, match=re.escape(path) + '.*Repair.*corrupt="skip"'):
            data[index]
    data = Masks("val", root=tmp_path, classes=THREE, corrupt="skip", max_corrupt=0.25)
    with pytest.warns(UserWarning, match="It is left out") as caught:
        found = list(data)
    assert [sample is None for sample in found] == [index in (1, 2) for index in range(8)]
    assert len(caught) == 2
    data = Masks("val", root=tmp_path, classes=THREE, corrupt="skip", max_corrupt=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CorruptImagesError, match="2 of 8 images of the val split"):
            list(data)


def test_wrong_label_images_are_not_skipped(tmp_path):
    write_masks(tmp_path)
    data = Masks("val", root=tmp_path, classes=THREE, corrupt="skip", max_corrupt=1.0)
    write_labels(Path(data.label_name(0)), np.zeros((3, 3), dtype=np.uint8))
    with pytest.raises(LabelError, match="3 x 3 pixels"):
        data[0]


def test_images_that_are_rotated_by_exif_are_named_as_the_reason(tmp_path):
    write_masks(tmp_path)
    data = Masks("val", root=tmp_path, classes=THREE)
    with Image.open(data.name(0)) as picture:
        exif = picture.getexif()
        exif[0x0112] = 6
        picture.copy().save(data.name(0), exif=exif)
    with pytest.raises(LabelError, match="set exif_orientation: false"):
        data[0]
    assert Masks("val", root=tmp_path, classes=THREE, exif_orientation=False)[0] is not None


@pytest.mark.parametrize("make", [Ade20k, Cityscapes, Voc, CocoStuff])
def test_missing_folders_are_reported_with_the_layout(tmp_path, make):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*Expected root/"):
        make("train", root=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"Expected root/"):
        make("train", root=tmp_path)


def test_missing_splits_are_reported_with_the_layout(tmp_path):
    write_ade20k(tmp_path / "ade")
    shutil.rmtree(tmp_path / "ade/annotations/validation")
    with pytest.raises(FileNotFoundError, match=r"no folder '.*annotations/validation'. Expected root/images"):
        Ade20k("val", root=tmp_path / "ade")
    write_voc(tmp_path / "voc")
    (tmp_path / "voc/ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no list of images '.*val.txt'. Expected root/JPEGImages"):
        Voc("val", root=tmp_path / "voc")
    with pytest.raises(FileNotFoundError, match=r"no list of images '.*aug.txt'"):
        Voc("train", root=tmp_path / "voc", augmented=True)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"size": 0}, ValueError, "size must be at least 1; got 0"),
        ({"size": (1, 2, 3)}, ValueError, "size must be one integer or two"),
        ({"test_scale": "big"}, TypeError, "test_scale must be an integer; got 'big'"),
        ({"corrupt": "ignore"}, ValueError, "corrupt must be one of 'refuse', 'skip'"),
        ({"mean": 0.5}, TypeError, "mean must be a sequence of 3 numbers"),
        ({"crop": 3}, TypeError, r"has no argument 'crop'.*It takes scale, ratio"),
        ({"ratios": (1, 2)}, TypeError, "Did you mean 'ratio'"),
    ],
)
def test_bad_options_are_refused_in_both_splits(tmp_path, options, error, text):
    write_ade20k(tmp_path)
    for split in ("train", "val"):
        with pytest.raises(error, match=text):
            Ade20k(split, root=tmp_path, **options)
