"""CIFAR from files in the published format, with fewer images if their number does not matter."""

import dataclasses
import io
import os
import pickle
import re

import numpy as np
import pytest
import torch
from made_sets import python2_pickle, write_cifar, write_tar
from torch.utils.data import DataLoader

from tolerances import FLOAT32, close
from widefield.data import Cifar10, Cifar100, collate, create
from widefield.data._cifar_files import CIFAR10, CIFAR100

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(Cifar10, "_files", dataclasses.replace(CIFAR10, counts={"train": 4, "val": 20}))
    monkeypatch.setattr(Cifar100, "_files", dataclasses.replace(CIFAR100, counts={"train": 100, "val": 100}))


@pytest.fixture
def root(tmp_path):
    write_cifar(tmp_path, Cifar10._files)
    return tmp_path


def images(pixels):
    """Return pixels (N, 3072) as float images (N, 3, 32, 32) in [0, 1]."""
    return torch.tensor(pixels.reshape(-1, 3, 32, 32)).float() / 255


@pytest.mark.parametrize("version", ["binary", "python"])
@pytest.mark.parametrize(("name", "kind"), [("cifar10", Cifar10), ("cifar100", Cifar100)])
@pytest.mark.parametrize("archive", [False, True])
def test_images_and_labels_are_those_of_the_files(tmp_path, name, kind, version, archive):
    made = write_cifar(tmp_path, kind._files, version, archive)
    for split, (pixels, labels) in made.items():
        data = create(name, split, root=str(tmp_path), version=version, padding=0, hflip=0, **PLAIN)
        assert len(data) == len(labels)
        assert data.classes == tuple(f"class_{i}" for i in range(len(data.classes)))
        assert [sample["label"] for sample in data] == labels.tolist()
        close(torch.stack([sample["image"] for sample in data]), images(pixels), FLOAT32)
    assert len(data.classes) == {"cifar10": 10, "cifar100": 100}[name]


def test_root_may_be_the_folder_or_archive_itself(tmp_path):
    write_cifar(tmp_path / "a", Cifar10._files)
    write_cifar(tmp_path / "b", Cifar10._files, archive=True)
    places = ("a", "a/cifar-10-batches-bin", "b", "b/cifar-10-binary.tar.gz")
    found = [collate(list(Cifar10("val", root=tmp_path / place)))["image"] for place in places]
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", [Cifar10, Cifar100])
def test_images_are_normalized_by_the_stated_statistics(tmp_path, kind):
    pixels, _ = write_cifar(tmp_path, kind._files)["val"]
    data = kind("val", root=tmp_path)
    assert data.mean == {Cifar10: (0.4914, 0.4822, 0.4465), Cifar100: (0.5071, 0.4865, 0.4409)}[kind]
    assert data.std == {Cifar10: (0.2470, 0.2435, 0.2616), Cifar100: (0.2673, 0.2564, 0.2762)}[kind]
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    close(data[3]["image"] * std + mean, images(pixels)[3], FLOAT32)
    assert data[3]["image"].dtype == torch.float32
    assert type(data[3]["label"]) is int


def test_train_images_are_padded_cropped_and_flipped(tmp_path):
    pixels, _ = write_cifar(tmp_path, Cifar10._files)["train"]
    data = Cifar10("train", root=tmp_path, **PLAIN)
    padded = torch.nn.functional.pad(images(pixels), (4, 4, 4, 4))
    places, flips = set(), set()
    for epoch in range(3):
        data.set_epoch(epoch)
        for index, sample in enumerate(data):
            crops = padded[index].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
            for flip, shown in enumerate((sample["image"], sample["image"].flip(-1))):
                hits = (crops - shown).abs().amax((2, 3, 4)).lt(1e-6).nonzero().tolist()
                places.update(map(tuple, hits))
                flips.update([flip] * len(hits))
                if hits:
                    break
            assert len(hits) == 1, "the image is no crop of the padded one"
    assert len(places) > 30
    assert {0, 8} <= {place for pair in places for place in pair}
    assert flips == {0, 1}


HEAVY = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 1.0, "size": 40}


def test_augmentation_is_a_function_of_seed_epoch_and_index(root):
    data, again = (Cifar10("train", root=root, **HEAVY) for _ in range(2))
    first = [sample["image"] for sample in data]
    assert first[0].shape == (3, 40, 40)
    backwards = [again[i]["image"] for i in reversed(range(20))]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(backwards), strict=True))
    data.set_epoch(1)
    assert not any(torch.equal(a, b["image"]) for a, b in zip(first, data, strict=True))
    other = Cifar10("train", root=root, seed=1, **HEAVY)
    assert not any(torch.equal(a, b["image"]) for a, b in zip(first, other, strict=True))


def test_workers_and_copies_give_the_same_batches(root):
    data = Cifar10("train", root=root, **HEAVY)
    copy = pickle.loads(pickle.dumps(data))
    one, *others = (
        list(DataLoader(d, 10, num_workers=n, collate_fn=collate)) for d, n in ((data, 0), (data, 2), (copy, 0))
    )
    for other in others:
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, other, strict=True))


def test_val_images_are_resized_whole(tmp_path):
    pixels, _ = write_cifar(tmp_path, Cifar10._files)["val"]
    data = Cifar10("val", root=tmp_path, size=64, interpolation="bilinear", auto_augment="3a", **PLAIN)
    expected = torch.nn.functional.interpolate(images(pixels), 64, mode="bilinear")
    # Pillow rounds to bytes after each of the two directions.
    close(torch.stack([sample["image"] for sample in data]), expected, 1.5 / 255)


def test_the_published_numbers_of_images_are_asked_for(tmp_path, monkeypatch):
    assert CIFAR10.counts == {"train": 50_000 // 5, "val": 10_000}
    assert CIFAR100.counts == {"train": 50_000, "val": 10_000}
    full = dataclasses.replace(CIFAR10, counts={"train": 10, "val": 10_000})
    made = write_cifar(tmp_path, full)
    monkeypatch.setattr(Cifar10, "_files", CIFAR10)
    data = Cifar10("val", root=tmp_path, **PLAIN)
    assert len(data) == 10_000
    close(data[-1]["image"], images(made["val"][0][-1:])[0], FLOAT32)
    with pytest.raises(ValueError, match=r"data_batch_1.bin holds 10 images and 10 labels; in CIFAR-10 it has 10,"):
        Cifar10("train", root=tmp_path)


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def test_pickles_are_read_only_when_asked_for(tmp_path):
    write_cifar(tmp_path, Cifar10._files, "python")
    with pytest.raises(FileNotFoundError, match=r"neither cifar-10-batches-bin nor cifar-10-binary.tar.gz. The python"):
        Cifar10("val", root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere' has no binary version of CIFAR-10: neither .*gz\.$"):
        Cifar10("val", root=tmp_path / "nowhere")


class Evil:
    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize("spot", ["test_batch", "batches.meta"])
def test_a_pickle_that_calls_something_is_refused(tmp_path, spot):
    write_cifar(tmp_path, Cifar10._files, "python")
    harm = tmp_path / "harm"
    (tmp_path / "cifar-10-batches-py" / spot).write_bytes(pickle.dumps({"data": Evil(harm)}))
    with pytest.raises(ValueError, match=rf"{spot} is not a file of CIFAR's Python version: .*asks for \w+.mkdir"):
        Cifar10("val", root=tmp_path, version="python")
    assert not harm.exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not a file of CIFAR's Python version: EOFError"),
        (python2_pickle([1]), "it holds list"),
        (python2_pickle({"data": np.zeros((20, 7), np.uint8)}), "has no array 'data' of 3,072 bytes an image"),
        (python2_pickle({"data": np.zeros((20, 3072), np.uint8), "labels": "no"}), "has no list of integers, 'labels'"),
        (
            python2_pickle({"data": np.zeros((20, 3072), np.uint8), "labels": [1]}),
            "test_batch holds 20 images and 1 labels; in CIFAR-10 it has 20 of each",
        ),
    ],
)
def test_pickles_of_something_else_are_refused(tmp_path, content, text):
    write_cifar(tmp_path, Cifar10._files, "python")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(text)):
        Cifar10("val", root=tmp_path, version="python")


def relabel(path, labels):
    records = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 3073).copy()
    records[: len(labels), 0] = labels
    path.write_bytes(records.tobytes())


@pytest.mark.parametrize(
    ("harm", "error", "text"),
    [
        (
            lambda p: cut(p / "test_batch.bin", 5),
            ValueError,
            "test_batch.bin has 61,455 bytes, which is not a multiple of",
        ),
        (lambda p: cut(p / "test_batch.bin", 3073), ValueError, "test_batch.bin holds 19 images"),
        (lambda p: relabel(p / "test_batch.bin", [77]), ValueError, "has the label 77; those of CIFAR-10 are 0 to 9"),
        (lambda p: relabel(p / "test_batch.bin", [3] * 9), ValueError, "CIFAR-10 has 2 of each"),
        (lambda p: (p / "batches.meta.txt").write_text("cat dog"), ValueError, "batches.meta.txt names 2 classes"),
        (lambda p: (p / "test_batch.bin").unlink(), FileNotFoundError, "test_batch.bin"),
    ],
)
def test_damaged_files_are_refused_by_name(root, harm, error, text):
    harm(root / "cifar-10-batches-bin")
    with pytest.raises(error, match=re.escape(text)):
        Cifar10("val", root=root)


def test_a_damaged_archive_is_refused(tmp_path):
    write_cifar(tmp_path, Cifar10._files, archive=True)
    path = tmp_path / "cifar-10-binary.tar.gz"
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"text", content[:1000] + bytes(100) + content[1100:]):
        path.write_bytes(broken)
        with pytest.raises(OSError, match=r"cifar-10-binary.tar.gz is not a complete archive: .*Download it again"):
            Cifar10("val", root=tmp_path)


def test_an_archive_without_its_files_is_refused(tmp_path):
    write_tar(tmp_path / "cifar-10-binary.tar.gz", [("readme.html", b"")], mode="w:gz")
    with pytest.raises(FileNotFoundError, match=r"lacks test_batch.bin, batches.meta.txt"):
        Cifar10("val", root=tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"version": "matlab"}, ValueError, "version must be one of 'binary', 'python'; got 'matlab'"),
        ({"padding": -1}, ValueError, "padding must be at least 0; got -1"),
        ({"hflip": 2}, ValueError, "hflip must be from 0.0 to 1; got 2"),
        ({"interpolation": "random"}, ValueError, "interpolation must be one of 'bilinear', 'bicubic'"),
        ({"auto_augment": "random"}, ValueError, "cannot build auto_augment='random'"),
        ({"std": (1, 1, 0)}, ValueError, "std must be positive"),
        ({"size": 0}, ValueError, "size must be at least 1"),
    ],
)
def test_bad_options_are_refused(root, options, error, text):
    for split in ("train", "val"):
        with pytest.raises(error, match=text):
            Cifar10(split, root=root, **options)


def test_the_made_pickles_are_those_of_python_2():
    """The files are read like the published ones in torchvision."""
    content = python2_pickle({"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [1, 2]})
    assert b"cnumpy.core.multiarray\n_reconstruct" in content
    assert pickle.BINSTRING + b"\x06\x00\x00\x00labels" in content
    found = pickle.load(io.BytesIO(content), encoding="latin1")
    assert found["data"].tolist() == [[0, 1, 2], [3, 4, 5]]
