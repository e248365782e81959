"""Metrics of segmentation, against sets of pixels in numpy and torchmetrics."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from widefield.tasks import SegmentationScores
from widefield.tasks.confusion import Confusion, boundary

NAMES = ("sky", "tree", "road", "car")


def maps(seed: int, count: int = 3, ignored: float = 0.2) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return predictions, masks and size groups of images of several sizes; the last class is never true."""
    draw = np.random.default_rng(seed)
    mine, true, groups = [], [], []
    for _ in range(count):
        size = draw.integers(1, 12, 2)
        mask = draw.integers(0, 3, size)
        group = np.where(mask == 0, 255, draw.integers(0, 2, size))  # sky is no object
        mask[draw.random(size) < ignored] = 255
        mine.append(torch.from_numpy(draw.integers(0, 4, size)))
        true.append(torch.from_numpy(mask))
        groups.append(torch.from_numpy(group.astype(np.uint8)))
    return mine, true, groups


def iou(mine: list[Tensor], true: list[Tensor], kept: list[Any], label: int) -> float:
    """Return the IoU of one class over the kept pixels of all images, from sets."""
    inter = union = 0
    for m, t, k in zip(mine, true, kept, strict=True):
        m, t, k = m.numpy() == label, t.numpy() == label, np.asarray(k)
        inter += int((m & t & k).sum())
        union += int(((m | t) & k).sum())
    return inter / union if union else math.nan


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([0.0, 0.3, 0.9]))
def test_means_over_classes(seed: int, ignored: float) -> None:
    mine, true, groups = maps(seed, ignored=ignored)
    metric = Confusion(NAMES, ("small", "large"), sync_on_compute=False)
    metric.update(mine, true, groups)
    found = {name: float(value) for name, value in metric.compute().items()}
    valid = [np.asarray(t) != 255 for t in true]
    each = [iou(mine, true, valid, label) for label in range(4)]
    flat = np.concatenate([np.asarray(t)[k] for t, k in zip(true, valid, strict=True)])
    guess = np.concatenate([np.asarray(m)[k] for m, k in zip(mine, valid, strict=True)])
    accuracies = [(guess[flat == label] == label).mean() for label in np.unique(flat)]
    expected = {
        "miou": np.nanmean(each) if len(flat) else math.nan,
        "macc": np.mean(accuracies) if accuracies else math.nan,
        "aacc": (flat == guess).mean() if len(flat) else math.nan,
    }
    for index, name in enumerate(("small", "large")):
        kept = [v & np.isin(np.asarray(g), [index, 255]) for v, g in zip(valid, groups, strict=True)]
        seen = np.concatenate(
            [np.asarray(t)[v & (np.asarray(g) == index)] for t, v, g in zip(true, valid, groups, strict=True)]
        )
        values = [iou(mine, true, kept, label) for label in np.unique(seen)]
        expected[f"miou_{name}"] = np.mean(values) if values else math.nan
    assert found == {name: pytest.approx(value, rel=1e-12, nan_ok=True) for name, value in expected.items()}


def test_torchmetrics_agrees() -> None:
    draw = torch.Generator().manual_seed(0)
    mine, true = (torch.randint(0, 4, (5, 9, 7), generator=draw) for _ in range(2))
    true[0, :3] = 255
    theirs = MulticlassJaccardIndex(4, average="none", ignore_index=255)(mine, true)
    metric = Confusion(NAMES)
    for part in range(5):  # batches of one, in place of one of five
        metric.update(mine[part : part + 1], true[part : part + 1])
    assert torch.allclose(metric.scores().iou.float(), theirs, atol=1e-7)
    assert metric.scores().counts.dtype == torch.int64


def test_an_absent_class_is_left_out_and_a_wrongly_predicted_one_counts() -> None:
    true, mine = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 2]])
    metric = Confusion(NAMES)
    metric.update([mine], [true])
    scores = metric.scores()
    assert scores.iou.tolist() == pytest.approx([1, 0.5, 0, math.nan], nan_ok=True)
    assert scores.metrics() == {"miou": 0.5, "macc": 0.75, "aacc": 0.75}


def test_objects_of_other_sizes_are_ignored_and_the_background_stays() -> None:
    """A large car that is missed does not lower the IoU of small ones; a car seen in the sky does."""
    true = [torch.tensor([[0, 0, 3, 3, 3]])]
    group = [torch.tensor([[255, 255, 0, 1, 1]], dtype=torch.uint8)]
    mine = [torch.tensor([[0, 3, 3, 0, 0]])]
    metric = Confusion(NAMES, ("small", "large"))
    metric.update(mine, true, group)
    found = metric.scores().metrics()
    assert found["miou_small"] == 1 / 2
    assert found["miou_large"] == 0


def test_images_without_size_groups_count_as_background() -> None:
    metric = Confusion(NAMES, ("small", "large"))
    metric.update([torch.tensor([[0, 1]])], [torch.tensor([[0, 1]])])
    found = metric.scores().metrics()
    assert found["miou"] == 1
    assert math.isnan(found["miou_small"])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.tuples(st.integers(1, 20), st.integers(1, 20)), st.integers(1, 6))
def test_boundary_is_each_region_without_its_erosion(seed: int, size: tuple[int, int], distance: int) -> None:
    """As the published code, which erodes each region by 3 x 3 squares, with zeros around the image."""
    mask = np.random.default_rng(seed).integers(0, 3, (4, 4)).repeat(5, 0).repeat(5, 1)[: size[0], : size[1]]
    square = np.ones((3, 3))
    expected = np.zeros(size, dtype=bool)
    for label in range(3):
        region = mask == label
        expected |= region & ~ndimage.binary_erosion(region, square, distance, border_value=0)
    assert np.array_equal(boundary(torch.from_numpy(mask), distance).numpy(), expected)


def test_boundary_iou() -> None:
    true = torch.zeros(40, 40, dtype=torch.int64)
    true[8:28, 8:28] = 1
    mine = torch.zeros_like(true)
    mine[10:30, 8:28] = 1
    metric = Confusion(NAMES[:2], boundary=0.02)  # distance 1
    metric.update([mine], [true])
    inter, union = metric.boundaries.tolist()
    rim = {(y, x) for y in range(8, 28) for x in range(8, 28)} - {(y, x) for y in range(9, 27) for x in range(9, 27)}
    moved = {(y + 2, x) for y, x in rim}
    assert (inter[1], union[1]) == (len(rim & moved), len(rim | moved))
    assert metric.scores().metrics()["boundary_miou"] == pytest.approx((inter[0] / union[0] + inter[1] / union[1]) / 2)


def test_boundaries_along_ignored_pixels_are_those_of_both() -> None:
    true = torch.zeros(30, 30, dtype=torch.int64)
    true[:, 15:] = 255
    metric = Confusion(NAMES[:2], boundary=0.05)
    metric.update([torch.zeros_like(true)], [true])
    assert metric.boundaries[0, 0] == metric.boundaries[1, 0] > 0
    assert not metric.boundaries[:, 1].any()


def test_scores_show_themselves() -> None:
    counts = torch.tensor([[[6, 2, 0], [1, 3, 0], [0, 0, 0]]])
    scores = SegmentationScores(("sky", "tree", "boat"), counts)
    rows = scores.rows()
    assert rows[0] == {
        "class": "sky", "IoU": "66.67%", "accuracy": "75.00%", "pixels": "66.67%",
        "mistaken for": "tree", "in": "25.00%",
    }  # fmt: skip
    assert rows[2]["IoU"] == rows[2]["mistaken for"] == "-"
    assert str(scores).startswith("miou 58.33%, macc 75.00%, aacc 75.00%; 12 pixels of 3 classes")
    assert "<td>tree</td>" in scores._repr_html_()
    plain = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert plain["iou"][2] is None
    assert plain["confusion"] == counts[0].tolist()
