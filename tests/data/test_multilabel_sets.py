"""Sets of images with any number of classes: tables, COCO's objects, generated scenes."""

import csv
import json
import pickle

import numpy as np
import pytest
import torch
from made_objects import CLASSES as OBJECTS
from made_objects import write_coco
from made_sets import picture
from torch.utils.data import DataLoader

from widefield import data
from widefield.data import Coco, CocoLabels, LabelTable, SceneLabels, Scenes, collate, create, create_both

ROWS = [
    ("a/1.png", ["cat", "dog"], "train"),
    ("a/2.png", [], "train"),
    ("b.png", ["eel"], "train"),
    ("c.png", ["dog"], "val"),
    ("d.png", ["cat", "dog", "eel"], "test"),
]


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    for file, _, _ in ROWS:
        (tmp_path / file).write_bytes(picture(rng))
    write_csv(tmp_path / "labels.csv")
    return tmp_path


def write_csv(path, rows=ROWS, columns=("file", "labels", "split"), separator=";"):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([name, separator.join(labels), split][: len(columns)] for name, labels, split in rows)


def test_a_table_names_the_classes_of_each_image(root):
    train, val = create_both("label_table", root=str(root), size=16, names=True)
    assert train.classes == val.classes == ("cat", "dog", "eel")
    assert train.present.tolist() == [[True, True, False], [False] * 3, [False, False, True]]
    assert [sample["name"] for sample in train] == ["1.png", "2.png", "b.png"]
    for index, sample in enumerate(train):
        assert sample["image"].shape == (3, 16, 16)
        assert sample["present"].tolist() == train.present[index].tolist()
    assert val.present.tolist() == [[False, True, False]]
    assert train.found() == (
        f"train: 3 images in {root}, 3 classes; left out: 1 of other splits ('d.png'); 1.0 classes per image"
    )
    assert "(2 without images, such as 'cat')" in val.found()
    batch = next(iter(DataLoader(train, 3, num_workers=1, collate_fn=collate)))
    assert batch["present"].dtype == torch.bool
    assert torch.equal(pickle.loads(pickle.dumps(train))[2]["image"], train[2]["image"])


def test_the_other_forms_of_a_table_say_the_same(root):
    expected = LabelTable("train", root=root, size=16)
    (root / "list.json").write_text(json.dumps([{"file": f, "labels": x, "split": s} for f, x, s in ROWS]))
    write_csv(root / "bars.csv", separator=" | ")
    for options in ({"table": "list.json"}, {"table": "bars.csv", "separator": "|"}):
        found = LabelTable("train", root=root, size=16, **options)
        assert found.fingerprint() == expected.fingerprint()
    (root / "map.json").write_text(json.dumps({file: labels for file, labels, _ in ROWS}))
    write_csv(root / "plain.csv", columns=("file", "labels"))
    halves = [
        [LabelTable(split, root=root, table=table, val_fraction=0.4, size=16) for split in ("train", "val")]
        for table in ("map.json", "plain.csv")
    ]
    for train, val in halves:
        assert (len(train), len(val)) == (3, 2)
        assert {train._name(i) for i in range(3)} | {val._name(i) for i in range(2)} == {str(root / r[0]) for r in ROWS}
        assert train.fingerprint() == halves[0][0].fingerprint()


def test_classes_may_be_given_in_an_order(root):
    (root / "words.txt").write_text("eel\ncat\nfox\ndog\n")
    for classes in ("words.txt", ["eel", "cat", "fox", "dog"]):
        found = LabelTable("train", root=root, classes=classes, size=16)
        assert found.classes == ("eel", "cat", "fox", "dog")
        assert found.present[0].tolist() == [False, True, False, True]


def rows_with(*changed):
    return [*ROWS[1:], *changed]


BAD = {
    "no table": ({"table": "none.csv"}, None, FileNotFoundError, "there is no table .*none.csv.*option table"),
    "another ending": ({"table": "b.png"}, None, ValueError, "table must end in .csv or .json"),
    "a missing image": ({}, rows_with(("e.png", ["cat"], "train")), FileNotFoundError, "1 of 3 .*missing.*e.png"),
    "an image twice": ({}, rows_with(ROWS[1]), ValueError, r"line 6 of .*has the image 'a/2.png' of line 2"),
    "no file": ({}, rows_with(("", ["cat"], "train")), ValueError, "line 6 of .* lacks a file or labels"),
    "an unknown class": (
        {"classes": ["cat", "dogs", "eel"]}, None, ValueError, "line 2 .*the label 'dog'.*Did you mean 'dogs'",
    ),
    "a class twice": ({"classes": ["cat", "cat"]}, None, ValueError, "classes has 'cat' more than once"),
    "classes of no kind": ({"classes": 3}, None, TypeError, "classes must be a list of names.*got 3"),
    "no such split": ({"train": "fit"}, None, FileNotFoundError, "no images of the split 'fit'; it has 'test'"),
    "two splits": ({"val_fraction": 0.5}, None, ValueError, "states splits and val_fraction is set"),
    "separator": ({"separator": ""}, None, TypeError, "separator must be a text"),
    "nothing": ({}, [], ValueError, "lists no images"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_refused(root, case):
    options, rows, error, text = BAD[case]
    if rows is not None:
        write_csv(root / "labels.csv", rows)
    with pytest.raises(error, match=text):
        LabelTable("train", root=root, **options)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[", "is not a JSON file"),
        ("3", 'must be a list of {"file": ..., "labels": .*; it is int'),
        ('[{"file": "b.png"}]', "entry 0 of .* is {'file': 'b.png'}"),
        ('[{"file": "b.png", "labels": "cat"}]', "entry 0 of"),
        ('{"b.png": ["cat"]}', "entry 0 of .* states no split: add a column split, or set val_fraction"),
    ],
)
def test_bad_json_tables_are_refused(root, content, text):
    (root / "labels.json").write_text(content)
    with pytest.raises(ValueError, match=text):
        LabelTable("train", root=root, table="labels.json")


def test_a_table_without_columns_is_refused(root):
    write_csv(root / "labels.csv", columns=("image", "labels"))
    with pytest.raises(ValueError, match=r"has no column 'file'; it has 'image', 'labels'.*file,labels,split"):
        LabelTable("train", root=root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_objects_become_labels_of_their_image(tmp_path, split):
    write_coco(tmp_path)
    objects = Coco(split, root=tmp_path)
    found = create("coco_labels", split, root=str(tmp_path), size=24)
    assert found.classes == OBJECTS
    assert len(found) == len(objects)
    for index in range(len(found)):
        assert found.name(index) == objects.name(index)
        start, end = objects.index.starts[index : index + 2]
        assert np.flatnonzero(found.present[index]).tolist() == sorted(set(objects.index.labels[start:end].tolist()))
    assert found[0]["image"].shape == (3, 24, 24)
    some = CocoLabels(split, root=tmp_path, size=24, categories=["car", "person"])
    assert some.classes == ("car", "person")
    assert some.present[:, 0].tolist() == found.present[:, OBJECTS.index("car")].tolist()


def test_broken_annotations_are_refused_or_left_out(tmp_path):
    write_coco(tmp_path)
    path = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 999
    path.write_text(json.dumps(content))
    with pytest.raises(data.AnnotationError, match=r"instances_val2017\.json: annotation"):
        CocoLabels("val", root=tmp_path)
    assert "left out: 1" in CocoLabels("val", root=tmp_path, repair=True).found()
    with pytest.raises(TypeError, match="repair must be True or False; got 'yes'"):
        CocoLabels("val", root=tmp_path, repair="yes")
    with pytest.raises(FileNotFoundError, match="there is no file of annotations"):
        CocoLabels("val", root=tmp_path / "x")


def test_scenes_have_the_classes_of_their_objects():
    found = create("scene_labels", "train", size=48, count=6, objects=[1, 5], hflip=0)
    scenes = Scenes("train", size=48, count=6, objects=[1, 5], hflip=0)
    for index in range(6):
        assert np.flatnonzero(found.present[index]).tolist() == sorted(set(scenes[index]["labels"].tolist()))
        assert torch.equal(found[index]["image"], scenes[index]["image"])
        assert found[index]["present"].tolist() == found.present[index].tolist()
    flipped = SceneLabels("train", size=48, count=6, hflip=1)
    first = flipped[0]["image"]
    assert torch.equal(SceneLabels("train", size=48, count=6, hflip=0)[0]["image"].flip(-1), first)
    half = SceneLabels("train", size=48, count=40)
    before = torch.stack([sample["image"] for sample in half])
    half.set_epoch(1)
    assert not torch.equal(torch.stack([sample["image"] for sample in half]), before)
