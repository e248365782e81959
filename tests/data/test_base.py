import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from made_sets import write_tar
from PIL import Image
from torch.utils.data import DataLoader

from widefield.data import Digits, Scales, catalog, collate, create, create_both, seeded
from widefield.data.base import padded


def global_state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_seeded_seeds_all_three_generators_and_restores_them():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    before = global_state()
    with seeded((0, 1, 2)):
        first = draw()
    assert global_state() == before
    with seeded((0, 1, 2)):
        assert draw() == first
    with seeded((0, 2, 1)):
        assert all(a != b for a, b in zip(draw(), first, strict=True))
    with pytest.raises(KeyError), seeded((0,)):
        raise KeyError
    assert global_state() == before


def test_reading_an_augmented_sample_leaves_the_global_generators_alone():
    data = Digits("train", augment=True)
    before = global_state()
    data[0]
    assert global_state() == before


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_give_the_same_batches_as_none(persistent):
    data = Digits("train", size=8, augment=True)
    options = {"batch_size": 256, "sampler": range(511, -1, -1), "collate_fn": collate}
    several = DataLoader(data, num_workers=2, persistent_workers=persistent, **options)
    for epoch in (0, 1):  # persistent workers hold a copy of the set made before epoch 1
        data.set_epoch(epoch)
        for ours, theirs in zip(DataLoader(data, **options), several, strict=True):
            assert torch.equal(ours["image"], theirs["image"])
            assert torch.equal(ours["label"], theirs["label"])


def test_collate_stacks_and_drops_none():
    batch = collate([{"image": torch.ones(3, 2, 2), "label": 4}, None, {"image": torch.zeros(3, 2, 2), "label": 1}])
    assert batch["image"].shape == (2, 3, 2, 2)
    assert batch["label"].dtype == torch.int64
    assert batch["label"].tolist() == [4, 1]
    assert collate([None, None]) == {}
    assert collate([]) == {}


def test_scales_collate_to_float32_sizes():
    data = create("scales", "val", count=4)
    batch = collate([data[i] for i in range(4)])
    assert batch["size"].dtype == torch.float32
    assert batch["mask"].shape == (4, 32, 32)


def test_create_passes_options_on():
    data = create("scales", "val", count=10, size=40)
    assert (len(data), data.image_size, data.split) == (10, 40, "val")
    assert len(create("digits", "train", size=8)) == 1442


@pytest.mark.parametrize(
    ("name", "split", "options", "error", "text"),
    [
        ("digit", "train", {}, ValueError, "got 'digit'. Did you mean 'digits'"),
        ("digits", "valid", {}, ValueError, "got 'valid'. Did you mean 'val'"),
        ("scales", "train", {"clutters": 1}, TypeError, "no option 'clutters'.*Did you mean 'clutter'"),
        ("folder", "train", {}, TypeError, "needs the option root, the folder that holds train and val"),
        ("cifar10", "train", {}, TypeError, "needs the option root, the folder or archive of the original files"),
        ("shards", "train", {"size": 8}, TypeError, "needs the option root, the folder that holds the tar files"),
        ("hfds", "train", {}, TypeError, "needs the option path, a name on the Hugging Face hub, or a folder"),
        ("shards", "train", {"re_porb": 1}, TypeError, "no option 're_porb'; it takes root, train, .*'re_prob'"),
        ("folder", "train", {"options": 1}, TypeError, "no option 'options'; it takes root, class_map, listing, "),
    ],
)
def test_create_refuses_what_it_does_not_know(name, split, options, error, text):
    with pytest.raises(error, match=text):
        create(name, split, **options)


def test_options_are_those_of_the_class_and_of_what_it_passes_on():
    assert catalog.options_of(Scales) == ["size", "count", "seed", "object_sizes", "clutter", "rotation"]
    options = {name: catalog.options_of(kind) for name, kind in catalog.SETS.items()}
    own = ["root", "class_map", "listing", "index", "refresh", "storage"]
    shared = options["folder"][len(own) :]
    assert options["folder"][: len(own)] == own
    assert {"size", "seed", "corrupt", "max_corrupt", "re_prob"} <= set(shared)
    assert options["shards"][-len(shared) :] == options["hfds"][-len(shared) :] == shared
    assert all(set(kind.needs) <= set(options[name]) for name, kind in catalog.SETS.items())


def labeled(root, train, val):
    """Write class folders with one image each."""
    for split, names in (("train", train), ("val", val)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(root / split / name / "0.png")


def test_both_splits_are_built_where_they_agree_on_labels(tmp_path):
    labeled(tmp_path, ["0", "1", "2"], ["0", "1"])  # val may lack the last
    train, val = create_both("folder", root=tmp_path, class_map="integer", size=8)
    assert (train.split, val.split, val.image_size) == ("train", "val", 8)
    assert [sample["label"] for sample in val] == [0, 1]


@pytest.mark.parametrize(
    ("train", "val", "text"),
    [
        ("cat dog eel", "cat eel", "label 1 is 'eel' in val, and in train 'dog'"),
        ("cat", "cat dog", "label 1 is 'dog' in val, and in train there is no such label"),
    ],
)
def test_splits_that_differ_in_what_a_label_means_are_refused(tmp_path, train, val, text):
    for split, names in (("train", train), ("val", val)):
        files = [(f"{name}/0.png", b"") for name in sorted(names.split())]
        write_tar(tmp_path / split / "all.tar", files)
    with pytest.raises(ValueError, match=f"the splits of 'shards' differ in classes: {text}"):
        create_both("shards", root=tmp_path)


def test_importing_the_room_is_light():
    code = (
        "import sys, widefield\n"
        "before = set(sys.modules)\n"
        "import widefield.data\n"
        "heavy = {'sklearn', 'torchvision', 'timm'} & (set(sys.modules) - before)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def padded_batch(samples):
    return padded(samples, (6, 9))


@pytest.mark.parametrize("workers", [0, 1])
def test_padded_images_are_written_once_to_shared_memory_in_workers(workers):
    images = [torch.rand(3, 6, 4), torch.rand(3, 1, 9), torch.rand(3, 5, 1)]
    (batch,) = DataLoader(images, batch_size=3, collate_fn=padded_batch, num_workers=workers)
    assert batch.is_shared() == bool(workers)
    assert batch.shape == (3, 3, 6, 9)
    for image, place in zip(images, batch, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(place[:, :height, :width], image)
        assert place.count_nonzero() == image.count_nonzero()
