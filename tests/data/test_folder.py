import errno
import pickle
import random
import re
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from widefield.data import Folder, collate, create
from widefield.data.transforms import _posterize


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.{'png' if i else 'jpg'}")
    return tmp_path


@pytest.fixture(params=["text", "truncated"])
def corrupt(request, root):
    """Return the path of one broken file: index 0 of train."""
    path = root / "train" / "cat" / "0.jpg"
    path.write_bytes(b"not a jpeg" if request.param == "text" else path.read_bytes()[:-400])
    return path


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_sample_has_the_promised_form(root, split):
    data = create("folder", split, root=str(root), size=24)
    assert len(data) == {"train": 6, "val": 4}[split]
    assert data.classes == ("cat", "dog")
    assert data.image_size == 24
    assert data.mean == (0.485, 0.456, 0.406)
    assert data.std == (0.229, 0.224, 0.225)
    for sample in data:
        assert sample["image"].shape == (3, 24, 24)
        assert sample["image"].dtype == torch.float32
        assert type(sample["label"]) is int
    assert [sample["label"] for sample in data] == [0] * (len(data) // 2) + [1] * (len(data) // 2)


def test_images_are_normalized_with_mean_and_std(root):
    path = root / "val" / "cat" / "0.jpg"
    Image.new("RGB", (30, 30), (255, 0, 51)).save(path.with_suffix(".png"))
    path.unlink()
    image = Folder("val", root=root, size=8, mean=(0.5, 0.5, 0.2), std=(0.5, 0.25, 1.0))[0]["image"]
    torch.testing.assert_close(image[:, 4, 4], torch.tensor([1.0, -2.0, 0.0]))


def test_gray_and_transparent_images_become_rgb(root):
    Image.new("L", (20, 20), 9).save(root / "val" / "cat" / "0.jpg")
    Image.new("RGBA", (20, 20)).save(root / "val" / "cat" / "1.png")
    data = Folder("val", root=root, size=16)
    assert data[0]["image"].shape == data[1]["image"].shape == (3, 16, 16)


HEAVY = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 1.0, "color_jitter": 0.3, "interpolation": "random"}


def test_augmentation_is_a_function_of_seed_epoch_and_index(root):
    data, again = (Folder("train", root=root, size=24, **HEAVY) for _ in range(2))
    first = [sample["image"] for sample in data]
    random.seed(5)
    torch.manual_seed(5)
    backwards = [again[i]["image"] for i in reversed(range(6))]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(backwards), strict=True))
    data.set_epoch(1)
    assert not any(torch.equal(a, b["image"]) for a, b in zip(first, data, strict=True))
    other = Folder("train", root=root, size=24, seed=1, **HEAVY)
    assert not any(torch.equal(a, b["image"]) for a, b in zip(first, other, strict=True))


def test_reading_leaves_the_global_generators_alone(root):
    data = Folder("train", root=root, size=24, **HEAVY)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    data[0]
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_workers_give_the_same_batches_as_none(root):
    data = Folder("train", root=root, size=24, **HEAVY)
    one, two = (DataLoader(data, 3, num_workers=n, collate_fn=collate) for n in (0, 2))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, two, strict=True))


def test_val_images_are_cropped_squashed_or_padded(root):
    path = root / "val" / "cat" / "0.jpg"
    Image.linear_gradient("L").resize((20, 40)).save(path.with_suffix(".png"))  # black at the top, white at the bottom
    path.unlink()
    options = {"root": root, "size": 20, "mean": (0, 0, 0), "std": (1, 1, 1), "crop_pct": 1.0}
    modes = ("center", "squash", "border")
    center, squash, border = (Folder("val", crop_mode=mode, **options)[0]["image"][0] for mode in modes)
    assert center.shape == squash.shape == border.shape == (20, 20)
    assert 0.2 < center[0].min() < center[-1].max() < 0.8
    assert squash[0].max() < 0.05
    assert squash[-1].min() > 0.95
    assert (border[:, [0, 4, 15, 19]] == 0).all()
    assert border[-1, 6:14].min() > 0.9


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m15-n2", "original", "v0", "augmix-m9-w3", "3a", "trivial"]
)
def test_the_policies_of_the_recipes_change_images(root, policy):
    plain, augmented = (Folder("train", root=root, size=24, auto_augment=p, color_jitter=0) for p in (None, policy))
    images = [data[index]["image"] for data in (augmented, plain) for index in range(6)]
    assert all(image.isfinite().all() for image in images)
    assert not all(torch.equal(a, b) for a, b in zip(images[:6], images[6:], strict=True))


def test_the_largest_magnitude_is_no_error(root):
    """timm keeps 0 bits there, which Pillow rejects."""
    data = Folder("train", root=root, size=8, auto_augment="rand-m10-n8-p1.0-inc1")
    for epoch in range(20):
        data.set_epoch(epoch)
        assert all(sample["image"].isfinite().all() for sample in data)
    assert _posterize(Image.new("RGB", (2, 2), "white"), 0).getcolors() == [(4, (0, 0, 0))]
    assert _posterize(Image.new("RGB", (2, 2), "white"), 1).getcolors() == [(4, (128, 128, 128))]


def test_trivial_augment_is_torchvisions_and_repeats(root):
    (step,) = (
        s for s in Folder("train", root=root, auto_augment="trivial")._transform.transforms if "Augment" in repr(s)
    )
    assert type(step).__name__ == "TrivialAugmentWide"
    assert step.interpolation.value == "bicubic"
    first, again = (
        [sample["image"] for sample in Folder("train", root=root, size=24, auto_augment="trivial")] for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_three_augment_keeps_color_jitter(root):
    def images(**options):
        return [s["image"] for s in Folder("train", root=root, size=24, **options)]

    for policy, same in (("3a", False), ("rand-m9-mstd0.5-inc1", True), ("trivial", True)):
        plain, jittered = (images(auto_augment=policy, color_jitter=strength) for strength in (0.0, 0.5))
        assert all(torch.equal(a, b) for a, b in zip(plain, jittered, strict=True)) == same


def test_samples_carry_the_name_of_their_file_if_asked(root):
    path = root / "val" / "cat" / "1.png"
    path.rename(path.with_name("ILSVRC2012_val_00000293.PNG"))
    batch = collate(list(Folder("val", root=root, size=16, names=True)))
    assert batch["name"] == ["0.jpg", "ILSVRC2012_val_00000293.PNG", "0.jpg", "1.png"]
    assert "name" not in Folder("val", root=root, size=16)[0]


def numbered(directory, names):
    """Make class folders with one image each, whose brightness is the number in the folder's name."""
    for name in names:
        (directory / name).mkdir(parents=True)
        Image.new("L", (8, 8), int(name)).save(directory / name / f"{name}.png")


def test_folders_named_by_index_are_no_words(tmp_path):
    numbered(tmp_path, [str(n) for n in range(12)])
    data = Folder("val", root=tmp_path, size=8, class_map="integer", mean=(0, 0, 0), std=(1, 1, 1))
    assert data.classes == tuple(str(n) for n in range(12))
    assert sorted((s["label"], round(255 * s["image"].max().item())) for s in data) == [(n, n) for n in range(12)]
    wrong = Folder("val", root=tmp_path, size=8)
    assert wrong.classes[:3] == ("0", "1", "10")


def test_a_class_map_decides_labels_whatever_folders_there_are(tmp_path):
    numbered(tmp_path / "train", ["3", "7", "20"])
    numbered(tmp_path / "val", ["7"])
    words = tmp_path / "words.txt"
    words.write_text("20\n7\n\nabsent\n3\n")
    for split, labels in (("train", [0, 3, 1]), ("val", [1])):
        data = Folder(split, root=tmp_path, size=8, class_map=str(words))
        assert [sample["label"] for sample in data] == labels  # in the order of the folders 20, 3, 7
        assert data.classes == ("20", "7", "absent", "3")
    for split in ("train", "val"):
        data = Folder(split, root=tmp_path, size=8, class_map="integer")
        assert len(data.classes) == 21
    words.write_text("20\n3\n")
    with pytest.raises(ValueError, match=r"words.txt' lacks '7'; add them, or remove"):
        Folder("train", root=tmp_path, class_map=words)


def test_val_may_be_the_folder_of_the_classes_itself(root):
    inside, itself = (Folder("val", root=path, size=24) for path in (root, root / "val"))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(inside, itself, strict=True))
    assert itself.classes == ("cat", "dog")
    (root / "sets").mkdir()
    for name in ("train", "val"):
        (root / name).rename(root / "sets" / name)
    with pytest.raises(FileNotFoundError, match="no folder 'val'; it holds 'sets'"):
        Folder("val", root=root)


def test_copies_read_the_same_files(root):
    data = Folder("train", root=str(root), size=24, **HEAVY)
    copy = pickle.loads(pickle.dumps(data))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(data, copy, strict=True))


def test_val_ignores_train_options_and_crops_by_crop_pct(root):
    plain = Folder("val", root=root, size=24)[0]["image"]
    assert torch.equal(Folder("val", root=root, size=24, **HEAVY)[0]["image"], plain)
    assert not torch.equal(Folder("val", root=root, size=24, crop_pct=1.0)[0]["image"], plain)


def test_a_corrupt_image_is_refused_with_its_path_and_both_mends(root, corrupt):
    data = Folder("train", root=root, size=24)
    with pytest.raises(OSError, match=re.escape(str(corrupt)) + '.*Repair or delete.*corrupt="skip"'):
        data[0]
    assert data[1]["image"].shape == (3, 24, 24)


def test_a_worker_refuses_a_corrupt_image_too(root, corrupt):
    loader = DataLoader(Folder("train", root=root, size=24), 3, num_workers=1, collate_fn=collate)
    with pytest.raises(OSError, match=re.escape(str(corrupt))):
        next(iter(loader))


def test_skip_warns_once_and_drops_the_sample(root, corrupt):
    data = Folder("train", root=root, size=24, corrupt="skip", max_corrupt=0.5)
    with pytest.warns(UserWarning, match=re.escape(str(corrupt))):
        assert data[0] is None
    assert data[0] is None  # a second warning would be an error
    (batch,) = DataLoader(data, 6, collate_fn=collate)
    assert batch["image"].shape[0] == len(batch["label"]) == 5
    for _ in range(2):  # new workers know it as well
        (batch,) = DataLoader(data, 6, num_workers=1, collate_fn=collate)
        assert batch["label"].tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "error",
    [SyntaxError("broken PNG"), struct.error("short"), ValueError("bad"), Image.DecompressionBombError("huge")],
)
def test_whatever_the_decoder_raises_counts_as_corrupt(root, monkeypatch, error):
    monkeypatch.setattr(Image, "open", raising(error))
    with pytest.raises(OSError, match=rf"0.jpg: {type(error).__name__}: {error}"):
        Folder("val", root=root)[0]
    with pytest.warns(UserWarning, match=rf"0.jpg: {type(error).__name__}: {error}"):
        assert Folder("val", root=root, corrupt="skip", max_corrupt=0.5)[0] is None


@pytest.mark.parametrize("policy", ["refuse", "skip"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), PermissionError),
        (OSError(errno.EMFILE, "Too many open files"), OSError),
        (OSError(errno.ESTALE, "Stale file handle"), OSError),
        (MemoryError(), MemoryError),
    ],
)
def test_what_the_system_refuses_is_no_corrupt_image(root, monkeypatch, error, raised, policy):
    monkeypatch.setattr(Image, "open", raising(error))
    path = re.escape(str(root / "val" / "cat" / "0.jpg"))
    with pytest.raises(raised, match=path) as caught:
        Folder("val", root=root, corrupt=policy)[0]
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)


def test_a_vanished_file_is_no_corrupt_image(root):
    data = Folder("val", root=root, size=24, corrupt="skip")
    path = root / "val" / "cat" / "0.jpg"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        data[0]


def test_layouts_are_checked(root):
    with pytest.raises(FileNotFoundError, match=r"not a folder: .*nowhere.*root/train/<class>/<image>"):
        Folder("train", root=root / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no folder 'train'; it holds 'cat', 'dog'.*root/train/<class>"):
        Folder("train", root=root / "train")
    (root / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no folder 'train'; it holds no folders"):
        Folder("train", root=root / "empty")
    (root / "empty" / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no class folders"):
        Folder("train", root=root / "empty")


def test_a_class_without_images_is_refused(root):
    for split in ("train", "val"):
        (root / split / "eel").mkdir()
    with pytest.raises(FileNotFoundError, match="eel"):
        Folder("train", root=root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_splits_must_have_the_same_classes(root, split):
    (root / "train" / "dog").rename(root / "train" / "wolf")
    with pytest.raises(ValueError, match="only in train: wolf; only in val: dog"):
        Folder(split, root=root)


def test_one_split_alone_is_enough_to_read_it(root):
    shutil.rmtree(root / "train")
    assert len(Folder("val", root=root)) == 4


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"corrupt": "ignore"}, ValueError, "corrupt must be one of 'refuse', 'skip'; got 'ignore'"),
        ({"mean": 0.5}, TypeError, "mean must be a sequence of 3 numbers; got 0.5"),
        ({"std": (1, 1, 0)}, ValueError, "std must be positive"),
        ({"crop_pct": 0}, ValueError, "crop_pct must be above 0; got 0"),
        ({"crop_mode": "middle"}, ValueError, "crop_mode must be one of 'center', 'squash', 'border'; got 'middle'"),
        ({"scale": (1, 0.5)}, ValueError, r"scale must be a range .* got \(1, 0.5\)"),
        ({"ratio": (0, 1)}, ValueError, "ratio must be a range"),
        ({"max_corrupt": 1.5}, ValueError, "max_corrupt must be from 0.0 to 1; got 1.5"),
        ({"re_mode": "noise"}, ValueError, "re_mode must be one of"),
        ({"interpolation": "cubic"}, ValueError, "Did you mean 'bicubic'"),
        ({"auto_augment": "random"}, ValueError, "cannot build auto_augment='random'.*Write a policy"),
        ({"auto_augment": 9}, TypeError, "auto_augment must be"),
    ],
)
def test_bad_options_are_refused_in_both_splits(root, options, error, text):
    for split in ("train", "val"):
        with pytest.raises(error, match=text):
            Folder(split, root=root, **options)


def test_classes_that_look_the_same_are_told_apart(root):
    (root / "train" / "dog").rename(root / "train" / "caf\u00e9")
    (root / "val" / "dog").rename(root / "val" / "cafe\u0301")
    with pytest.raises(ValueError, match="must have the same classes") as caught:
        Folder("train", root=root)
    message = str(caught.value)
    assert r"only in val: 'cafe\u0301'" in message
    assert "only in train: caf\u00e9;" in message
    assert "NFD, as macOS writes them). Rename one of them." in message
    (root / "map.txt").write_text("cat\ncaf\u00e9\n", encoding="utf-8")
    for split in ("train", "val"):
        data = Folder(split, root=root, size=8, class_map=root / "map.txt")
        assert data.classes == ("cat", "caf\u00e9")
        assert sorted({sample["label"] for sample in data}) == [0, 1]
