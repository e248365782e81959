"""Images in tar files equal those of a folder bit by bit, in every layout."""

import json
import os
import pickle
import re
import tarfile

import numpy as np
import pytest
import torch
from made_sets import CLASSES, picture, pictures, tar_bytes, webdataset, write_folder, write_tar
from torch.utils.data import DataLoader

from widefield.data import CorruptImageError, Folder, Shards, _kept, collate, create

HEAVY = {"size": 24, "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 1.0, "interpolation": "random"}


def by_class(root, split, found):
    for name, files in found.items():
        write_tar(root / split / f"{name}.tar", files)


def of_folders(root, split, found):
    members = [(f"./{split}/{name}/{file}", content) for name, files in found.items() for file, content in files]
    write_tar(root / split / "all.tar", [*members, ("notes.txt", b"no image"), ("set.json", b"{}")])


def of_tars(root, split, found):
    write_tar(root / split / "all.tar", [(f"{name}.tar", tar_bytes(files)) for name, files in found.items()])


def labeled(ending):
    def write(root, split, found):
        for name in found:  # a tar file for each class: the order of a folder's samples
            own = [file.partition(".")[0] for file, _ in found[name]]
            members = [m for m in webdataset(found, ending) if m[0].partition(".")[0] in own]
            write_tar(root / split / f"shard-{name}.tar", [*members, ("0.txt", b"caption")])

    return write


LAYOUTS = {
    "a tar file a class": by_class,
    "folders in a tar file": of_folders,
    "tar files in a tar file": of_tars,
    "webdataset, cls": labeled("cls"),
    "webdataset, json": labeled("json"),
}


@pytest.fixture
def found():
    return pictures(3)


@pytest.fixture
def root(tmp_path, found):
    labeled("cls")(tmp_path, "train", found)
    return tmp_path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_are_those_of_a_folder(tmp_path, layout, found):
    val = pictures(2, seed=1)
    for split, files in (("train", found), ("val", val)):
        LAYOUTS[layout](tmp_path / "tars", split, files)
        write_folder(tmp_path / "files", split, files)
    for split in ("train", "val"):
        data = create("shards", split, root=str(tmp_path / "tars"), names=True, **HEAVY)
        expected = Folder(split, root=tmp_path / "files", names=True, **HEAVY)
        assert data.classes == (("0", "1", "2") if "web" in layout else CLASSES)
        for epoch in range(2):
            data.set_epoch(epoch)
            expected.set_epoch(epoch)
            for ours, theirs in zip(data, expected, strict=True):
                assert torch.equal(ours["image"], theirs["image"])
                assert {**ours, "image": 0} == {**theirs, "image": 0}


def test_workers_read_by_themselves_even_after_the_parent_has(root):
    data = Shards("train", root=root, **HEAVY)
    own = [data[i] for i in range(9)]  # a file left open here would be shared by forked workers
    order = np.random.default_rng(0).integers(0, 9, 90).tolist()
    loader = DataLoader(data, 5, sampler=order, num_workers=2, collate_fn=collate)
    batches = list(loader)
    assert torch.equal(torch.cat([b["image"] for b in batches]), torch.stack([own[i]["image"] for i in order]))
    assert torch.cat([b["label"] for b in batches]).tolist() == [own[i]["label"] for i in order]
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[4]["image"], own[4]["image"])


def test_which_tar_files_are_a_split_is_a_glob(tmp_path, found):
    members = webdataset(found)
    write_tar(tmp_path / "set-train-0.tar", members[:10])
    write_tar(tmp_path / "set-train-1.tar", members[10:])
    write_tar(tmp_path / "set-validation-0.tar", members[:4])
    options = {"root": tmp_path, "size": 16, "train": "set-train-*.tar", "val": "*val*.tar"}
    assert [s["label"] for s in Shards("train", **options)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(Shards("val", **options)) == 2


def test_long_and_foreign_names_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    name = f"{'föhn/' * 40}{'x' * 120}.png"
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        write_tar(tmp_path / "train/a.tar", [(name, picture(rng)), ("b/1.png", picture(rng))], format=kind)
        data = Shards("train", root=tmp_path, size=16, names=True)
        assert data.classes == ("b", "föhn")
        assert [s["name"] for s in data] == [f"{'x' * 120}.png", "1.png"]


def test_a_class_map_orders_folders_and_names_labels(tmp_path, found):
    by_class(tmp_path / "a", "train", found)
    labeled("cls")(tmp_path / "b", "train", found)
    words = tmp_path / "words.txt"
    words.write_text("dog\neel\nfox\ncat\n")
    data = Shards("train", root=tmp_path / "a", class_map=words, size=8)
    assert data.classes == ("dog", "eel", "fox", "cat")
    assert [s["label"] for s in data] == [3, 3, 3, 0, 0, 0, 1, 1, 1]
    data = Shards("train", root=tmp_path / "b", class_map=words, size=8)
    assert data.classes == ("dog", "eel", "fox", "cat")
    assert [s["label"] for s in data] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert Shards("train", root=tmp_path / "b", class_map="integer", size=8).classes == ("0", "1", "2")
    words.write_text("dog\neel\n")
    with pytest.raises(ValueError, match=r"words.txt' ends before label 2, which is in the data"):
        Shards("train", root=tmp_path / "b", class_map=words)


def images(data):
    return torch.stack([sample["image"] for sample in data])


def test_the_index_is_kept_until_a_tar_file_changes(root, found, monkeypatch):
    plain = {"root": root, "size": 16, "hflip": 0, "scale": (1, 1), "color_jitter": 0}
    first = images(Shards("train", **plain))
    (kept,) = root.glob(".widefield-tar-index-*.npz")
    assert not list(root.rglob("*.tmp"))
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        assert torch.equal(images(Shards("train", **plain)), first)
    content = kept.read_bytes()
    for damaged in (content[:500], b"", b"text"):
        kept.write_bytes(damaged)
        assert torch.equal(images(Shards("train", **plain)), first)
        assert kept.read_bytes() == content
    path = root / "train" / "shard-cat.tar"
    before = path.stat()
    (_, one), (_, two), _ = found["cat"]
    members = webdataset({"cat": [("cat0.png", two), ("cat1.png", one), found["cat"][2]]})
    write_tar(path, [*members, ("0.txt", b"caption")])
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    changed = images(Shards("train", **plain))
    assert torch.equal(changed[2:], first[2:])
    assert not torch.equal(changed[0], first[0])
    assert len(list(root.glob(".widefield-tar-index-*.npz"))) == 2


def test_a_pickle_is_no_index(root):
    data = Shards("train", root=root, size=16)
    (kept,) = root.glob(".widefield-tar-index-*.npz")
    fields = dict(np.load(kept))
    fields["offsets"] = np.array([print], dtype=object)
    with kept.open("wb") as file:
        np.savez(file, allow_pickle=True, **fields)
    assert torch.equal(images(Shards("train", root=root, size=16)), images(data))


def test_an_index_that_cannot_be_kept_is_no_reason_to_stop(root, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_kept, "write_whole", refuse)
    with pytest.warns(UserWarning, match=r"cannot be kept in .* \(Permission denied\).*The option index"):
        data = Shards("train", root=root, size=16)
    assert data[0]["image"].shape == (3, 16, 16)


def test_the_index_may_lie_elsewhere(root, tmp_path):
    (tmp_path / "scratch").mkdir()
    Shards("train", root=root, index=tmp_path / "scratch")
    assert len(list((tmp_path / "scratch").iterdir())) == 1
    assert not list(root.glob(".widefield*"))
    with pytest.raises(FileNotFoundError, match=r"index is not a folder: .*nowhere"):
        Shards("train", root=root, index=tmp_path / "nowhere")


def test_a_tar_file_cut_after_its_headers_were_read_costs_its_images(root):
    data = Shards("train", root=root, size=16, corrupt="skip", max_corrupt=1.0)
    path = root / "train" / "shard-eel.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.warns(UserWarning, match=r"shard-eel.tar/eel0.png: the tar file ends before it does"):
        assert data[6] is None
    assert data[5] is not None
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-eel\.tar"):
        data[7]


def test_a_broken_image_in_a_tar_file_is_named(root):
    data = Shards("train", root=root, size=16)
    path = root / "train" / "shard-dog.tar"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CorruptImageError, match=r"shard-dog.tar/dog1.jpeg.*Repair or delete"):
        data[4]


LABELS = {
    "dog": ("cls", b"dog", "train/a.tar/x.cls must be the index of a class, from 0; got 'dog'"),
    "-1": ("cls", b"-1", "got '-1'"),
    "1.0": ("json", b'{"label": 1.5}', "'label' in .*train/a.tar/x.json must be the index of a class, from 0; got 1.5"),
    "true": ("json", b'{"label": true}', "got True"),
    "no entry": ("json", b'{"cls": 1}', "x.json gives no 'label': KeyError: 'label'. The option label_key"),
    "no JSON": ("json", b"{", "x.json gives no 'label': JSONDecodeError"),
    "a list": ("json", b"[1]", "x.json gives no 'label': TypeError"),
}


@pytest.mark.parametrize("case", LABELS)
def test_bad_labels_are_refused_by_name(tmp_path, case):
    ending, content, text = LABELS[case]
    write_tar(tmp_path / "train/a.tar", [("x.png", b""), (f"x.{ending}", content)])
    with pytest.raises(ValueError, match=text):
        Shards("train", root=tmp_path)


def test_the_entry_of_the_label_has_a_name(tmp_path):
    write_tar(tmp_path / "train/a.tar", [("x.png", picture(np.random.default_rng(0))), ("x.json", b'{"cls": "2"}')])
    data = Shards("train", root=tmp_path, label_key="cls")
    assert data[0]["label"] == 2
    assert data.classes == ("0", "1", "2")
    with pytest.raises(TypeError, match="label_key must be the name of an entry; got 3"):
        Shards("train", root=tmp_path, label_key=3)


def test_an_image_without_label_among_others_is_refused(tmp_path, found):
    write_tar(tmp_path / "train/a.tar", webdataset(found))
    write_tar(tmp_path / "train/b.tar", [("lone.png", b"")])
    with pytest.raises(ValueError, match=r"b.tar/lone.png has no label next to it .* but .*a.tar/cat0.png has"):
        Shards("train", root=tmp_path)


def test_a_sample_of_several_images_is_refused(tmp_path):
    write_tar(tmp_path / "train/a.tar", [("x.left.png", b""), ("x.right.png", b""), ("x.cls", b"0")])
    with pytest.raises(ValueError, match=r"a.tar holds several images of the sample 'x'"):
        Shards("train", root=tmp_path)


@pytest.mark.parametrize("harm", ["cut", "text", "compressed", "empty"])
def test_what_is_no_tar_file_is_refused_by_name(root, found, harm):
    path = root / "train" / "shard-dog.tar"
    if harm == "compressed":
        write_tar(path, webdataset(found), mode="w:gz")
    else:
        path.write_bytes({"cut": path.read_bytes()[:5000], "text": b"text " * 300, "empty": b""}[harm])
    with pytest.raises(OSError, match=rf"{re.escape(str(path))} is not a complete, uncompressed tar file: "):
        Shards("train", root=root)


def test_missing_tar_files_are_reported_with_those_that_are_there(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file in .* is named 'val/\*.tar'; it holds train/shard-cat.tar"):
        Shards("val", root=root)
    with pytest.raises(FileNotFoundError, match=r"Set the option train to a glob that fits"):
        Shards("train", root=root, train="*.tar.gz")
    with pytest.raises(FileNotFoundError, match=r"root is not a folder: .*nowhere"):
        Shards("train", root=tmp_path / "nowhere")
    write_tar(tmp_path / "other/train/a.tar", [("notes.txt", b"")])
    with pytest.raises(FileNotFoundError, match=r"no image in 1 tar files, .*a.tar among them"):
        Shards("train", root=tmp_path / "other")


@pytest.mark.parametrize(("pattern", "error"), [("/data/*.tar", ValueError), ("", ValueError), (3, TypeError)])
def test_bad_globs_are_refused(root, pattern, error):
    with pytest.raises(error, match=rf"train must be a glob .* got {re.escape(repr(pattern))}"):
        Shards("train", root=root, train=pattern)


@pytest.mark.parametrize("label", ["-1", "1.0", "1_0", "cat", "", "\u0663", "99999999999999999999"])
@pytest.mark.parametrize("ending", ["cls", "json"])
def test_a_label_that_is_no_index_is_refused_with_its_file(tmp_path, found, label, ending):
    content = label if ending == "cls" else json.dumps({"label": label})
    members = [(n, content.encode() if n == f"dog1.{ending}" else c) for n, c in webdataset(found, ending)]
    write_tar(tmp_path / "train" / "a.tar", members)
    with pytest.raises(ValueError, match=rf"a\.tar/dog1\.{ending} must be the index of a class, from 0; got '"):
        Shards("train", root=tmp_path)


@pytest.mark.parametrize("label", [5_000, 2_000_000_000])
def test_a_label_does_not_size_a_network_that_the_images_cannot_fill(tmp_path, found, label):
    members = [(n, str(label).encode() if n == "dog1.cls" else c) for n, c in webdataset(found)]
    write_tar(tmp_path / "train" / "a.tar", members)
    with pytest.raises(
        ValueError, match=rf"the label of .*a\.tar/dog1\.jpeg is {label:,}, which .* classes for 9 images"
    ):
        Shards("train", root=tmp_path)
    (tmp_path / "words.txt").write_text("".join(f"{i}\n" for i in range(5001)))
    if label == 5_000:  # all classes have names
        assert len(Shards("train", root=tmp_path, class_map=tmp_path / "words.txt").classes) == 5_001
    else:
        with pytest.raises(ValueError, match=rf"ends before label {label}.*dog1\.jpeg"):
            Shards("train", root=tmp_path, class_map=tmp_path / "words.txt")
