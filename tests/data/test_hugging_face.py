"""Hugging Face data sets, generated here if the package is installed."""

import importlib.machinery
import importlib.util
import pickle

import numpy as np
import pytest
import torch
from made_sets import CLASSES, pictures, write_folder, write_parquet
from torch.utils.data import DataLoader

from widefield.data import Folder, HuggingFace, collate, create

HEAVY = {"size": 24, "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 1.0}


def test_without_the_package_the_error_names_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        create("hfds", "train", path="timm/mini-imagenet")


def test_a_mere_folder_of_that_name_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "datasets").mkdir()
    folder = importlib.machinery.PathFinder.find_spec("datasets", [str(tmp_path)])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: folder if name == "datasets" else find(name))
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        HuggingFace("train", path="x")


@pytest.fixture
def root(tmp_path):
    pytest.importorskip("datasets")
    write_parquet(tmp_path / "set", "train", pictures(3))
    write_parquet(tmp_path / "set", "validation", pictures(2, seed=1))
    return tmp_path / "set"


def test_samples_are_those_of_a_folder(root, tmp_path):
    for split, files in (("train", pictures(3)), ("val", pictures(2, seed=1))):
        write_folder(tmp_path / "files", split, files)
    for split in ("train", "val"):
        data = create("hfds", split, path=str(root), cache=tmp_path / "cache", names=True, **HEAVY)
        expected = Folder(split, root=tmp_path / "files", names=True, **HEAVY)
        assert data.classes == CLASSES
        for ours, theirs in zip(data, expected, strict=True):
            assert torch.equal(ours["image"], theirs["image"])
            assert {**ours, "image": 0} == {**theirs, "image": 0}


def test_workers_and_copies_give_the_same_samples(root, tmp_path):
    data = HuggingFace("train", path=root, cache=tmp_path / "cache", **HEAVY)
    copy = pickle.loads(pickle.dumps(data))
    one, *others = (
        list(DataLoader(d, 4, num_workers=n, collate_fn=collate)) for d, n in ((data, 0), (data, 2), (copy, 0))
    )
    for other in others:
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, other, strict=True))


def test_splits_and_columns_have_names(root, tmp_path):
    options = {"path": root, "cache": tmp_path / "cache", "size": 16}
    assert len(HuggingFace("val", val="train[:50%]", **options)) == 4
    write_parquet(tmp_path / "other", "train", pictures(2), image_key="img", label_key="fine", classes=None)
    options["path"] = tmp_path / "other"
    data = HuggingFace("train", image_key="img", label_key="fine", **options)
    assert [s["label"] for s in data] == [0, 0, 1, 1, 2, 2]
    assert data.classes == ("0", "1", "2")
    with pytest.raises(ValueError, match=r"has no column 'label' of labels, label_key; it has img, fine"):
        HuggingFace("train", image_key="img", **options)
    with pytest.raises(ValueError, match=r"has no column 'image' of images. Set image_key"):
        HuggingFace("train", label_key="fine", **options)
    with pytest.raises(ValueError, match=r"cannot read the split 'validation' of .*Unknown split"):
        HuggingFace("val", **options)


@pytest.mark.parametrize(
    ("labels", "text"), [([0, -1], "from 0; got -1"), (["a", "b"], "from 0; got 'a'"), ([0, None], "from 0; got None")]
)
def test_labels_must_be_indices(tmp_path, labels, text):
    pytest.importorskip("datasets")
    files = {"cat": pictures(2)["cat"]}
    write_parquet(tmp_path, "train", files, classes=None, labels=labels)
    with pytest.raises(ValueError, match=rf"the column 'label' of .* must hold the index of a class, {text}"):
        HuggingFace("train", path=tmp_path, cache=tmp_path / "cache")


def test_a_row_without_image_is_a_corrupt_one(tmp_path):
    pytest.importorskip("datasets")
    (first, content), (second, _), _ = pictures(3)["cat"]
    write_parquet(tmp_path, "train", {"cat": [(first, content), (None, None)], "dog": [(second, content)]}, classes=())
    data = HuggingFace("train", path=tmp_path, cache=tmp_path / "cache", corrupt="skip", max_corrupt=0.5)
    with pytest.warns(UserWarning, match=r"train/1: the row has none. It is left out"):
        assert [sample is None for sample in data] == [False, True, False]


def test_a_set_that_is_not_there_is_an_oserror(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    with pytest.raises(OSError, match="nowhere"):
        HuggingFace("train", path=tmp_path / "nowhere", cache=tmp_path / "cache")


def test_labels_are_read_without_decoding_images(root, tmp_path):
    data = HuggingFace("train", path=root, cache=tmp_path / "cache")
    assert data.labels.tolist() == np.repeat([0, 1, 2], 3).tolist()


@pytest.mark.parametrize(
    ("labels", "classes", "text"),
    [
        ([0, 1, -1], None, r"got -1 in row 2 of 'train', and 0 more\. -1 marks images without a label"),
        (["a", "b", "a"], None, r"got 'a' in row 0 of 'train', and 2 more\. Dataset\.class_encode_column"),
        ([0, 2**62, 1], None, r"got 4611686018427387904 in row 1"),
        ([0, 1.0, 1], None, r"got 0\.0 in row 0"),
        ([0, 1, 2_000_000_000], None, r"the label of .*/train/2 is 2,000,000,000, which makes .* for 3 images"),
        ([0, 2, 1], ("cat", "dog"), r"the label of .*/train/1 is 2, but .* names only 2 classes"),
    ],
)
def test_labels_are_checked_before_they_size_a_network(tmp_path, labels, classes, text):
    pytest.importorskip("datasets")
    write_parquet(tmp_path, "train", {"cat": pictures(3)["cat"]}, classes=classes, labels=labels)
    with pytest.raises(ValueError, match=text):
        HuggingFace("train", path=tmp_path, cache=tmp_path / "cache")
