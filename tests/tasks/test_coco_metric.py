"""COCO's figures of detections, against pycocotools and faster-coco-eval."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.detections import Case, random_case, reference, updated
from widefield.dense import Detections
from widefield.tasks import CocoMetric, TrueObjects

NONE = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
EMPTY = TrueObjects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), (50, 60))


def figures(metric: CocoMetric, kind: str = "box") -> list[float]:
    """Return the twelve figures in COCO's order, with its -1 in place of NaN."""
    values = metric.scores().kinds[kind].figures.values()
    return [-1.0 if math.isnan(value) else value for value in values]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.booleans(),
    st.sampled_from([0.0, 0.2, 0.7]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_boxes_equal_pycocotools_to_the_last_digit(seed: int, ties: bool, crowd: float, dtype: torch.dtype) -> None:
    case = random_case(seed, ties=ties, crowd=crowd, dtype=dtype)
    assert figures(updated(case)) == reference(case).stats.tolist()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.4]))
def test_masks_equal_pycocotools_to_the_last_digit(seed: int, crowd: float) -> None:
    case = random_case(seed, masks=True, images=3, side=80, crowd=crowd)
    metric = updated(case, masks=True)
    assert figures(metric, "mask") == reference(case, masks=True).stats.tolist()
    assert figures(metric) == reference(case).stats.tolist()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_faster_coco_eval_agrees(seed: int, masks: bool) -> None:
    case = random_case(seed, masks=masks, side=80, found=20)
    if not sum(len(found.boxes) for found in case.found):
        return
    metric = updated(case, masks=masks)
    stats = reference(case, masks=masks, fast=True).stats[:12]
    assert figures(metric, "mask" if masks else "box") == pytest.approx(list(stats), abs=1e-12)


def test_large_objects_and_many_detections_equal_pycocotools() -> None:
    """Objects of all of COCO's sizes; more detections of a class than are used."""
    case = random_case(3, images=12, side=640, most=12, found=160, classes=2)
    metric = updated(case)
    expected = reference(case).stats.tolist()
    assert min(expected) > 0
    assert figures(metric) == expected
    fewer = updated(case, max_per_image=20)
    evaluator = reference(case, most=20)
    assert fewer.scores().kinds["box"].figures["ar20"] == evaluator.stats[8] < expected[8]
    assert fewer.scores().kinds["box"].figures["ap75"] == evaluator.stats[2]


def test_each_class_equals_pycocotools() -> None:
    case = random_case(5, images=10, classes=5, side=300)
    evaluator = reference(case)
    scores = updated(case).scores().kinds["box"]
    precision = evaluator.eval["precision"][..., 0, 2]
    assert scores.ap.tolist() == pytest.approx(precision.mean((0, 1)).tolist(), abs=1e-14)
    assert scores.ap50.tolist() == pytest.approx(precision[0].mean(0).tolist(), abs=1e-14)


@pytest.mark.parametrize("relative", [False, True])
def test_finer_groups_equal_pycocotools_with_their_ranges(relative: bool) -> None:
    """pycocotools takes any ranges; those of relative sizes are the same in images of one size."""
    case = random_case(8, images=12, side=200, most=10, ties=False)
    if relative:
        true = [
            TrueObjects(x.boxes, x.labels, (400, 100), x.crowd, x.area) for x in case.true
        ]  # sqrt(area) is 200 pixels
        case = case._replace(true=true)
    edges = (0.04, 0.1, 0.25) if relative else (8, 20, 50)
    metric = updated(case, size_bins=edges, relative_sizes=relative)
    evaluator = reference(case)
    pixels = np.array([0, 8, 20, 50, 1e5])
    evaluator.params.areaRng = [[a**2, b**2] for a, b in itertools.pairwise(pixels)]
    evaluator.params.areaRngLbl = ["all", "small", "medium", "large"]
    evaluator.evaluate()
    evaluator.accumulate()
    precision = evaluator.eval["precision"][..., 2]  # (T, R, K, A)
    expected = [np.mean(part[part > -1]) for part in np.moveaxis(precision, -1, 0)]
    scores = metric.scores()
    assert scores.size_bins == (
        ("<0.04", "0.04-0.1", "0.1-0.25", ">=0.25") if relative else ("<8", "8-20", "20-50", ">=50")
    )
    assert scores.kinds["box"].ap_by_size.tolist() == expected
    assert scores.objects_by_size.sum() == scores.objects.sum()


def test_an_object_on_an_edge_is_in_one_group() -> None:
    box = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    metric = CocoMetric(["x"], size_bins=[8, 16, 32])
    metric.update(
        [Detections(box, torch.ones(1), torch.zeros(1).long())], [TrueObjects(box, torch.zeros(1).long(), (32, 32))]
    )
    assert metric.scores().objects_by_size.tolist() == [[0], [0], [1], [0]]


def test_the_order_of_images_and_their_batches_do_not_matter() -> None:
    """Equal scores in many images are counted in the order of the images."""
    case = random_case(11, images=8)
    whole = updated(case)
    order = [3, 7, 0, 5, 1, 6, 2, 4]
    parts = CocoMetric(case.classes)
    for start in range(0, 8, 3):
        rows = order[start : start + 3]
        parts.update([case.found[i] for i in rows], [case.true[i] for i in rows], torch.tensor(rows))
    assert figures(parts) == figures(whole)
    assert json.dumps(parts.scores().to_dict()) == json.dumps(whole.scores().to_dict())


def gathered(shares: list[CocoMetric]) -> list[CocoMetric]:
    """Synchronize metrics as several processes do, without starting any."""
    sent: list[list[torch.Tensor]] = []
    for share in shares:
        sent.append([])

        def keep(x: torch.Tensor, group: object = None, to: list[torch.Tensor] = sent[-1]) -> list[torch.Tensor]:
            to.append(x)
            return [x]

        share.sync(dist_sync_fn=keep, distributed_available=lambda: True)
        share.unsync()
    assert all(part.dtype == other.dtype for row in sent for part, other in zip(row, sent[0], strict=True))
    for share in shares:
        rows = iter(zip(*sent, strict=True))
        share.sync(dist_sync_fn=lambda x, group=None, rows=rows: list(next(rows)), distributed_available=lambda: True)
    return shares


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_shares_of_processes_give_the_results_of_all_images(processes: int) -> None:
    """Five images: shares differ in length, and of six processes the last one has none."""
    case = random_case(11, images=5, masks=True, side=80)
    whole = updated(case, masks=True)
    shares = [CocoMetric(case.classes, masks=True, sync_on_compute=False) for _ in range(processes)]
    for process, share in enumerate(shares):
        for place, index in enumerate(range(process, 5, processes)):
            share.update([case.found[index]], [case.true[index]], torch.tensor([place]))
    alone = shares[0].scores().objects.sum()
    for share in gathered(shares):
        assert json.dumps(share.scores().to_dict()) == json.dumps(whole.scores().to_dict())
        share.unsync()
    assert shares[0].scores().objects.sum() == alone < whole.scores().objects.sum()


def test_a_metric_can_be_reset() -> None:
    case = random_case(2)
    metric = updated(case)
    first = json.dumps(metric.scores().to_dict())
    metric.reset()
    assert metric.scores().objects.sum() == 0
    metric.update(case.found, case.true)
    assert json.dumps(metric.scores().to_dict()) == first


def test_without_objects_there_is_no_figure() -> None:
    metric = CocoMetric(["x", "y"])
    metric.update([NONE], [EMPTY])
    found = metric.compute()
    assert found.keys() == {"box_ap", "box_ap50", "box_ap75", "box_ap_small", "box_ap_medium", "box_ap_large"}
    assert all(math.isnan(value) for value in found.values())
    box = Detections(torch.tensor([[1.0, 1, 9, 9]]), torch.ones(1), torch.zeros(1).long())
    metric.update([box], [EMPTY])
    assert math.isnan(metric.compute()["box_ap"])
    assert all(row["box AP"] == "-" for row in metric.scores().rows())
    json.dumps(metric.scores().to_dict(), allow_nan=False)


def test_a_class_without_objects_is_left_out_and_one_without_detections_is_0() -> None:
    boxes = torch.tensor([[0.0, 0, 20, 20], [30, 30, 45, 50]])
    true = TrueObjects(boxes, torch.tensor([0, 2]), (50, 60))
    found = Detections(boxes[[0, 0]], torch.tensor([0.9, 0.8]), torch.tensor([0, 1]))
    metric = CocoMetric(["a", "b", "c"])
    metric.update([found], [true])
    scores = metric.scores()
    assert metric.compute()["box_ap"] == pytest.approx(0.5)
    assert scores.kinds["box"].ap.tolist() == pytest.approx([1, math.nan, 0], nan_ok=True)
    assert [row["objects"] for row in scores.rows()] == ["1", "0", "1"]
    assert "box_ap 50.00%" in str(scores)


def test_masks_inside_of_boxes_are_pasted() -> None:
    box = torch.tensor([[10.0, 20, 40, 60]])
    mask = torch.zeros(1, 80, 90, dtype=torch.bool)
    mask[0, 20:60, 10:40] = True
    metric = CocoMetric(["x"], masks=True)
    found = Detections(box, torch.ones(1), torch.zeros(1).long(), torch.ones(1, 28, 28))
    metric.update([found], [TrueObjects(box, torch.zeros(1).long(), (80, 90), masks=mask)])
    assert metric.compute()["mask_ap"] == pytest.approx(1)


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match=r"size_bins must be positive and rising; got \[8, 8\]"):
        CocoMetric(["x"], size_bins=[8, 8])
    with pytest.raises(TypeError, match=r"size_bins must be a list of rising numbers such as"):
        CocoMetric(["x"], size_bins=8)  # type: ignore[arg-type]
    metric = CocoMetric(["x"], masks=True)
    with pytest.raises(ValueError, match="average precision of masks needs masks, and the data have none"):
        metric.update(
            [Detections(torch.rand(1, 4), torch.ones(1), torch.zeros(1).long(), torch.ones(1, 28, 28))], [EMPTY]
        )


def test_little_is_kept_of_a_detection() -> None:
    case: Case = random_case(0, images=6, masks=True, side=80, found=40)
    metric = updated(case, masks=True)
    count = sum(len(found.boxes) for found in case.found)
    kept = sum(part.numel() for part in metric.rows)
    assert count > 60
    assert kept / count < 110
