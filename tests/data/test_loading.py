import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from widefield.data import Digits, collate, create, seeded


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
        ("folder", "train", {}, TypeError, "needs the option root"),
    ],
)
def test_create_refuses_what_it_does_not_know(name, split, options, error, text):
    with pytest.raises(error, match=text):
        create(name, split, **options)


def test_importing_the_room_is_light():
    code = (
        "import sys, widefield\n"
        "before = set(sys.modules)\n"
        "import widefield.data\n"
        "heavy = {'sklearn', 'torchvision', 'timm'} & (set(sys.modules) - before)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
