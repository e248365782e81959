"""COCO's figures of poses, against pycocotools; distances, against mmpose's definitions; kinds of errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.poses import Case, random_case, reference
from tolerances import FLOAT64
from widefield.data.skeleton import Skeleton
from widefield.tasks import FoundPoses, People, PoseMetric, TruePoses


def nobody(keypoints: int) -> People:
    whole = torch.zeros(0, dtype=torch.int64)
    return People(torch.zeros(0, keypoints, 3), torch.zeros(0, 4), torch.zeros(0), whole, whole.bool())


def skeleton(sigmas: np.ndarray, swapped: tuple[int, ...] | None = None) -> Skeleton:
    count = len(sigmas)
    return Skeleton(tuple(f"point {k}" for k in range(count)), swapped or tuple(range(count)), tuple(sigmas.tolist()))


def updates(case: Case) -> list[tuple[FoundPoses, TruePoses]]:
    """Return one batch for each image, whose first sample brings the people. Images without a pose have a NaN."""
    found = []
    for image, points in enumerate(case.points):
        count = max(len(points), 1)
        keypoints = torch.tensor(case.keypoints[image])
        people = People(
            keypoints, torch.tensor(case.boxes[image]), torch.tensor(case.areas[image]),
            torch.tensor(case.kinds[image]), torch.tensor(case.crowd[image]),
        )  # fmt: skip
        none = not len(points)
        preds = FoundPoses(
            torch.zeros(1, len(case.sigmas), 2) if none else torch.tensor(points),
            torch.full((1,), math.nan) if none else torch.tensor(case.scores[image]),
            torch.zeros(count, 4), torch.ones(count),
            torch.zeros(1, dtype=torch.int64) if none else torch.tensor(case.labels[image]),
            torch.full((count,), image),
        )  # fmt: skip
        truth = TruePoses(
            torch.zeros(count, len(case.sigmas), 3),
            torch.zeros(count),
            [people, *[nobody(len(case.sigmas))] * (count - 1)],
        )
        found.append((preds, truth))
    return found


def updated(case: Case, **options: Any) -> PoseMetric:
    names = [f"class {index}" for index in range(case.classes)]
    metric = PoseMetric(names, skeleton(case.sigmas), sync_on_compute=False, **{"nms_threshold": 1.0, **options})
    for preds, truth in updates(case):
        metric.update(preds, truth)
    return metric


def stats(metric: PoseMetric) -> list[float]:
    """Return the ten figures in COCO's order, with its -1 in place of NaN."""
    figures = metric.scores().figures
    names = ("ap", "ap50", "ap75", "ap_medium", "ap_large", "ar", "ar50", "ar75", "ar_medium", "ar_large")
    assert set(figures) == set(names)
    return [-1.0 if math.isnan(figures[name]) else figures[name] for name in names]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10**6), st.booleans(), st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.4]), st.integers(1, 3)
)
def test_figures_equal_pycocotools_to_the_last_digit(
    seed: int, ties: bool, crowd: float, unlabeled: float, classes: int
) -> None:
    case = random_case(seed, ties=ties, crowd=crowd, unlabeled=unlabeled, classes=classes)
    assert stats(updated(case)) == reference(case).stats.tolist()


def test_more_poses_than_count_equal_pycocotools() -> None:
    case = random_case(5, images=5, found=90, most=12, keypoints=17)
    expected = reference(case).stats.tolist()
    assert min(expected) > 0
    assert stats(updated(case)) == expected


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 3))
def test_each_key_point_is_measured_as_if_it_were_the_only_one(seed: int, keypoint: int) -> None:
    case = random_case(seed, keypoints=4, images=3)
    found = updated(case).scores().by_keypoint
    expected = reference(case.only(keypoint)).stats[0]
    assert (-1.0 if math.isnan(found.ap[keypoint]) else found.ap[keypoint]) == expected
    people = [(k[:, keypoint, 2] > 0) & ~c for k, c in zip(case.keypoints, case.crowd, strict=True)]
    assert found.count[keypoint] == sum(one.sum() for one in people)


def test_classes_and_finer_sizes_equal_pycocotools() -> None:
    case = random_case(8, images=12, classes=2, most=10, ties=False)
    edges = (20, 60, 120)
    scores = updated(case, size_bins=edges).scores()
    pixels = [0.0, *edges, 1e5]
    ranges = [(a**2, b**2) for a, b in itertools.pairwise(pixels)]
    precision = reference(case, ranges).eval["precision"][..., 0]  # (T, R, K, A)
    expected = [np.mean(part[part > -1]) for part in np.moveaxis(precision, -1, 0)]
    assert scores.by_size.ap.tolist() == expected
    assert scores.by_size.names == ("<20", "20-60", "60-120", ">=120")
    assert scores.by_size.count.sum() == scores.people.sum()
    whole = reference(case).eval["precision"][..., 0, 0]
    assert scores.class_ap.tolist() == pytest.approx(whole.mean((0, 1)).tolist(), abs=1e-14)


def test_batches_processes_and_the_order_of_images_do_not_matter() -> None:
    """Equal scores in many images are counted in the order of the samples, as in one process."""
    case = random_case(11, images=9, classes=2, crowd=0.2)
    whole = updated(case)
    rows = []  # one sample each, with its place
    for preds, truth in updates(case):
        for row in range(len(preds)):
            part = slice(row, row + 1)
            one = FoundPoses(*(getattr(preds, name)[part] for name in
                               ("points", "scores", "boxes", "areas", "labels", "images")))  # fmt: skip
            rows.append((one, TruePoses(truth.keypoints[part], truth.areas[part], truth.people[part])))
    metrics = []
    for process in range(3):
        metric = PoseMetric(whole.classes, whole.skeleton, nms_threshold=1.0, sync_on_compute=False)
        share = list(enumerate(rows[process::3]))
        for place, (preds, truth) in share[::-1]:  # in any order
            metric.update(preds, truth, torch.tensor([place]))
        metrics.append(metric)
    together = PoseMetric(whole.classes, whole.skeleton, nms_threshold=1.0, sync_on_compute=False)
    for name in ("poses", "people"):
        setattr(together, name, torch.cat([part for metric in metrics for part in getattr(metric, name)]))
    assert together.scores().to_dict() == whole.scores().to_dict()


def test_duplicates_are_dropped_within_their_class() -> None:
    """Two things of different classes at one place. The first has two poses, and the worse has the higher score."""
    keypoints = torch.tensor([[10.0, 10, 2], [30, 10, 2], [20, 40, 2]], dtype=torch.float64).expand(2, 3, 3)
    boxes, areas, labels = torch.tensor([[5.0, 5, 35, 45]]).expand(2, 4), torch.full((2,), 1200.0), torch.tensor([0, 1])
    people = People(keypoints, boxes, areas, labels, torch.zeros(2).bool())
    points = keypoints[0, :, :2] + torch.tensor([4.0, 0.0, 0.0])[:, None, None]
    preds = FoundPoses(points, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, 4), torch.full((3,), 1200.0),
                       torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.int64))  # fmt: skip
    truth = TruePoses(torch.zeros(3, 3, 3), torch.zeros(3), [people, nobody(3), nobody(3)])
    found = []
    for threshold in (1.0, 0.5):
        metric = PoseMetric(["a", "b"], skeleton(np.full(3, 0.1)), nms_threshold=threshold)
        metric.update(preds, truth)
        found.append(metric.scores().class_ap.tolist())
    similarity = math.exp(-32 / (2 * 1200 * 0.2**2))  # 4 pixels off in x and y: 0.717
    hits = sum(similarity >= threshold for threshold in np.linspace(0.5, 0.95, 10))
    assert hits == 5
    assert found[0] == pytest.approx([(hits + (10 - hits) * 0.5) / 10, 1.0])  # the second one comes after a wrong one
    assert found[1] == pytest.approx([hits / 10, 1.0])


def distances_case() -> tuple[FoundPoses, TruePoses]:
    truth = torch.tensor([[[10.0, 10, 2], [30, 10, 1], [0, 0, 0]], [[50.0, 50, 2], [0, 0, 0], [0, 0, 0]]]).double()
    gaps = torch.tensor([[[3, 4.0], [0, 2.25], [9, 9]], [[0.0, 12.0], [1, 1], [1, 1]]]).double()  # 5, 2.25, 12
    preds = FoundPoses(
        truth[..., :2] + gaps, torch.ones(2), torch.tensor([[0.0, 0, 40, 20], [30, 30, 70, 90]]),
        torch.ones(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64),
    )  # fmt: skip
    return preds, TruePoses(truth, torch.tensor([400.0, 2000.0]), [nobody(3), nobody(3)])


def test_pck_auc_and_epe_are_those_of_mmpose() -> None:
    """The means over key points of the fractions within a limit; the mean distance over all."""
    preds, truth = distances_case()
    metric = PoseMetric(["person"], skeleton(np.full(3, 0.1)), size_bins=[30])
    metric.update(preds, truth)
    scores = metric.scores()
    # The longer sides are 40 and 60 pixels: 5% are 2 and 3, 20% are 8 and 12, which a distance of 12 is not below.
    assert scores.by_keypoint.pck.tolist() == pytest.approx([0, 0, math.nan], nan_ok=True)
    assert scores.by_keypoint.pck20.tolist() == pytest.approx([0.5, 1, math.nan], nan_ok=True)
    assert scores.by_keypoint.error.tolist() == pytest.approx([8.5, 2.25, math.nan], nan_ok=True)
    limits = np.arange(20) * 1.5
    auc = np.mean([np.mean([np.mean(np.array([5, 12]) < limit), limit > 2.25]) for limit in limits])
    expected = {"pck": 0.0, "pck20": 0.75, "auc": auc, "epe": (5 + 12 + 2.25) / 3}
    assert scores.distances == {name: pytest.approx(value, abs=FLOAT64) for name, value in expected.items()}
    assert scores.by_size.error.tolist() == pytest.approx([3.625, 12])
    assert scores.by_size.pck20.tolist() == pytest.approx([1, 0])


def test_boxes_of_a_detector_have_no_distances() -> None:
    preds, truth = distances_case()
    metric = PoseMetric(["person"], skeleton(np.full(3, 0.1)))
    metric.update(preds, TruePoses(torch.zeros(2, 3, 3), truth.areas, truth.people))
    values = {name: float(value) for name, value in metric.compute().items()}
    assert set(values) == {"oks_ap", "oks_ap50", "oks_ap75", "oks_ap_medium", "oks_ap_large", "oks_ar",
                           "pck", "pck20", "auc", "epe"}  # fmt: skip
    assert all(math.isnan(value) for value in values.values())
    assert metric.scores().to_dict()["metrics"]["epe"] is None


def test_kinds_of_errors() -> None:
    """One key point of each kind; points of one person are 40 pixels apart, those of two people 200."""
    sigmas = np.full(6, 0.1)  # at an area of 10^4: similarity 0.85 at 11 pixels, 0.5 at 24
    people = torch.zeros(2, 6, 3)
    people[..., 0] = torch.arange(6) * 40.0 + torch.tensor([[0.0], [1000.0]])
    people[..., 2] = 2
    people[0, 5, 2] = 0
    points = people[0, :, :2].clone()
    points[1, 1] += 15  # jitter
    points[2] = people[0, 3, :2]  # inversion: 2 and 3 change places
    points[3] = people[1, 2, :2]  # swap, on the other side of the other person
    points[4, 1] += 60  # miss
    preds = FoundPoses(points[None], torch.ones(1), torch.zeros(1, 4), torch.ones(1), torch.tensor([0]),
                       torch.tensor([0]))  # fmt: skip
    known = People(people, torch.zeros(2, 4), torch.full((2,), 1e4), torch.tensor([0, 0]), torch.tensor([False] * 2))
    metric = PoseMetric(["person"], skeleton(sigmas, (0, 1, 3, 2, 4, 5)))
    metric.update(preds, TruePoses(torch.zeros(1, 6, 3), torch.zeros(1), [known]))
    errors = metric.scores().errors
    assert errors.counts.tolist() == [
        [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0] * 5
    ]  # fmt: skip
    assert errors.shares == pytest.approx(dict.fromkeys(("good", "jitter", "inversion", "swap", "miss"), 0.2))
    assert errors.rows()[-1] == {"key point": "all", "compared": "5", **dict.fromkeys(errors.shares, "20.0%")}


def test_tables_have_a_row_for_everything() -> None:
    case = random_case(2, classes=2, keypoints=3, images=8)
    scores = updated(case, size_bins=[64]).scores()
    assert [row["key point"] for row in scores.rows()] == ["point 0", "point 1", "point 2"]
    assert [row["size"] for row in scores.size_rows()] == ["<64", ">=64"]
    assert [row["class"] for row in scores.class_rows()] == ["class 0", "class 1"]
    assert len(scores.figure_rows()[0]) == 10
    assert "people" in scores.summary()


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match=r"nms_threshold must be from 0.0 to 1.0; got 2"):
        PoseMetric(["x"], skeleton(np.ones(2)), nms_threshold=2)
    with pytest.raises(ValueError, match=r"size_bins must be positive and rising; got \[2, 1\]"):
        PoseMetric(["x"], skeleton(np.ones(2)), size_bins=[2, 1])
