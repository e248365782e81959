"""Files that readers find or omit, and their reports."""

import os
import tarfile

import pytest
from made_sets import pictures, tar_bytes, webdataset, write_folder, write_tar

from widefield.data import ConflictImages, Digits, Folder, Pictures, Scales, Shards, create_both, summarize

HIDDEN = (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".Trash")


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        write_folder(tmp_path, split, pictures(count))
    return tmp_path


def image(content=None):
    return content or pictures(1)["cat"][0][1]


def littered(folder):
    """Put hidden folders and files with images into a folder."""
    for name in HIDDEN:
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes(image())
    (folder / "._a.png").write_bytes(image())


def of_folder(root):
    return Folder("train", root=root, size=8)


def of_pictures(root):
    return Pictures(root / "train", size=8)


READERS = pytest.mark.parametrize("reader", [of_folder, of_pictures])


@READERS
def test_hidden_folders_and_files_are_no_classes_and_no_images(root, reader):
    littered(root / "train")
    littered(root / "train" / "cat")
    (root / "train" / "cat" / ".hidden").mkdir()
    data = reader(root)
    assert data.classes == ("cat", "dog", "eel")
    assert [data[i]["label"] for i in range(len(data))] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert "9 images" in data.found()
    assert "11 hidden (" in data.found()


def test_a_data_set_of_class_folders_is_told_from_one_of_splits_by_what_is_not_hidden(root):
    littered(root / "val")
    assert Folder("val", root=root / "val", size=8).classes == ("cat", "dog", "eel")
    littered(root)
    assert Folder("val", root=root, size=8).classes == ("cat", "dog", "eel")
    only = root / "only"
    only.mkdir()
    littered(only)
    with pytest.raises(FileNotFoundError, match=r"has no folder 'val'; it holds no folders"):
        Folder("val", root=only)
    with pytest.raises(FileNotFoundError, match=r"holds no images .* Left out: 5 hidden"):
        Pictures(only)


@READERS
def test_links_to_folders_and_files_are_followed(root, reader, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (root / "train" / "dog").rename(elsewhere / "dog")
    (root / "train" / "dog").symlink_to(elsewhere / "dog")
    (elsewhere / "more").mkdir()
    (elsewhere / "more" / "deep.png").write_bytes(image())
    (root / "train" / "eel" / "more").symlink_to(elsewhere / "more")
    (root / "train" / "cat" / "linked.png").symlink_to(elsewhere / "more" / "deep.png")
    data = reader(root)
    assert data.classes[:3] == ("cat", "dog", "eel")
    assert len(data) == 11
    assert all(data[i]["image"].shape == (3, 8, 8) for i in range(11))


@READERS
def test_links_that_lead_back_are_left_out_and_named(root, reader):
    train = root / "train"
    (train / "all").symlink_to(train)
    (train / "up").symlink_to(root)
    (train / "cat" / "up").symlink_to(train)
    (train / "dog" / "self").symlink_to(train / "dog")
    (train / "eel" / "itself").symlink_to(train / "eel" / "itself")
    data = reader(root)
    assert data.classes == ("cat", "dog", "eel")
    assert len(data) == 9
    assert "4 links to a folder that they lie in (" in data.found()
    assert "1 broken links (" in data.found()


def test_links_from_class_to_class_end(root):
    (root / "train" / "cat" / "dogs").symlink_to(root / "train" / "dog")
    (root / "train" / "dog" / "cats").symlink_to(root / "train" / "cat")
    data = Folder("train", root=root, size=8)
    labels = [data[i]["label"] for i in range(len(data))]
    assert labels == [0] * 6 + [1] * 6 + [2] * 3


def test_files_are_in_torchvisions_order(root):
    from torchvision.datasets import ImageFolder

    for name in ("a-b/1.png", "a/2.png", "a/b/3.png", "A.PNG", "z.JpEg"):
        path = root / "train" / "cat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image())
    expected = ImageFolder(root / "train")
    data = Folder("train", root=root, size=8)
    assert [data._name(i) for i in range(len(data))] == [path for path, _ in expected.samples]
    assert data.labels.tolist() == expected.targets


def test_what_is_left_out_of_a_folder_is_said_with_the_reason(root):
    for name in ("notes.txt", "cat/a.heic", "cat/b.heic", "dog/README"):
        (root / "train" / name).write_bytes(b"x")
    (root / "train" / "gone").symlink_to(root / "nowhere")
    found = Folder("train", root=root, size=8).found()
    assert found.startswith(f"train: 9 images in {root / 'train'}, 3 classes; left out: ")
    for part in (
        f"2 outside the class folders ('{root / 'train' / 'gone'}', ...)",
        f"2 not images by their ending, .heic ('{root / 'train' / 'cat' / 'a.heic'}', ...)",
        f"1 not images, without an ending ('{root / 'train' / 'dog' / 'README'}')",
    ):
        assert part in found
    assert "left out" not in Folder("val", root=root, size=8).found()


def test_a_class_without_images_is_named_with_the_endings_that_count(root):
    (root / "train" / "fox").mkdir()
    (root / "val" / "fox").mkdir()
    (root / "train" / "fox" / "a.heic").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"train' has no image of 'fox'\. Remove .*endings \.jpg, "):
        Folder("train", root=root)


def test_hidden_members_of_tar_files_are_left_out(tmp_path):
    files = {name: content for name, [(_, content)] in pictures(1).items()}
    litter = [(f"{name}/a.png", image()) for name in HIDDEN]
    litter += [("./cat/._a.png", image()), ("__MACOSX/cat/._a.png", image()), ("cat/notes.txt", b"x")]
    members = [(f"{name}/a.png", content) for name, content in files.items()]
    write_tar(tmp_path / "train" / "all.tar", [*litter, *members])
    write_tar(tmp_path / "train" / "._all.tar", [("cat/b.png", image())])
    data = Shards("train", root=tmp_path, size=8)
    again = Shards("train", root=tmp_path, size=8)  # from the cached index
    for found in (data, again):
        assert found.classes == ("cat", "dog", "eel")
        assert len(found) == 3
        assert "6 hidden (" in found.found()
        assert "1 not images by their ending, .txt (" in found.found()
    inner = tar_bytes([("._a.png", image()), ("a.png", image())])
    write_tar(tmp_path / "val" / "all.tar", [("cat.tar", inner), ("._cat.tar", b"x"), ("dog.tar", inner)])
    assert Shards("val", root=tmp_path, size=8).classes == ("cat", "dog")
    write_tar(tmp_path / "other" / "all.tar", [("._a.png", image())])
    with pytest.raises(FileNotFoundError, match=r"no image in 1 tar files.* Left out: 1 hidden"):
        Shards("train", root=tmp_path, train="other/*.tar")


def test_links_in_tar_files_are_followed(tmp_path):
    folder = tmp_path / "made"
    write_folder(folder, "set", {name: files for name, files in pictures(2).items() if name != "eel"})
    os.link(folder / "set" / "cat" / "cat0.png", folder / "set" / "cat" / "same.png")
    (folder / "set" / "dog" / "cat.png").symlink_to("../cat/cat0.png")
    (folder / "set" / "eel").symlink_to("hound")
    (folder / "set" / "hound").symlink_to("dog")
    (folder / "set" / "dog" / "gone.png").symlink_to("nowhere.png")
    (folder / "set" / "dog" / "up").symlink_to("..")
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "all.tar", "w") as archive:
        archive.add(folder / "set", "set")
    data = Shards("train", root=tmp_path, size=8)
    counts = {name: data.labels.tolist().count(label) for label, name in enumerate(data.classes)}
    assert counts == {"cat": 3, "dog": 3, "eel": 3, "hound": 3}
    assert all(data[i]["image"].shape == (3, 8, 8) for i in range(len(data)))
    assert "2 links to no image in their tar file (" in data.found()


def test_hidden_images_in_conflict_are_left_out(tmp_path):
    (tmp_path / "cat").mkdir()
    for name in ("cat1-dog1.png", "._cat1-dog1.png"):
        (tmp_path / "cat" / name).write_bytes(image())
    littered(tmp_path)
    assert len(ConflictImages(tmp_path)) == 1


def test_sets_without_files_say_what_they_are():
    assert (
        summarize(Digits("train"), Scales("val", count=7))
        == "train: 1,442 images, 10 classes\nval: 7 images, 8 classes"
    )
    assert Pictures(count=1).found() == "1 image of photographs"
    assert Pictures("digits", count=5, size=16).found() == "5 of digits val: 355 images, 10 classes"


def test_classes_without_images_are_named(tmp_path):
    members = webdataset({name: files for name, files in pictures(2).items() if name != "cat"})
    write_tar(tmp_path / "train" / "a.tar", [(n, b"4" if n == "eel1.cls" else c) for n, c in members])
    data = Shards("train", root=tmp_path, size=8)
    assert data.classes == ("0", "1", "2", "3", "4")
    assert data.found() == f"train: 4 images in {tmp_path}, 5 classes (2 without images, such as '2')"


def test_training_needs_two_classes_and_says_which_folder_has_one(tmp_path):
    for split in ("train", "val"):
        write_folder(tmp_path, split, {"cat": pictures(1)["cat"]})
    assert Folder("train", root=tmp_path, size=8).classes == ("cat",)
    with pytest.raises(ValueError, match=r"the train split in '.*train' has only the class 'cat'; a classifier needs"):
        create_both("folder", root=tmp_path)
