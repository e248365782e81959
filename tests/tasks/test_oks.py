"""Object keypoint similarity and its suppression, against pycocotools and the published loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.poses import random_case, reference
from tolerances import FLOAT64
from widefield._coco.keypoints import distinct, oks, oks_nms, pose_areas, similarities


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 23), st.booleans())
def test_similarity_equals_pycocotools_to_the_last_digit(seed: int, keypoints: int, ties: bool) -> None:
    case = random_case(seed, images=3, keypoints=keypoints, ties=ties, unlabeled=0.4)
    expected = reference(case).ious
    for image, points in enumerate(case.points):
        best = np.argsort(-case.scores[image], kind="stable")[:20]
        people = case.keypoints[image], case.areas[image], case.boxes[image]
        found = oks(points[best], *people, case.sigmas)
        assert found.shape == (len(best), len(people[0]))
        if found.size:
            assert np.array_equal(found, expected[image + 1, 1])


def test_key_points_that_are_not_finite_are_like_nothing() -> None:
    case = random_case(3, images=1, most=6)
    points = case.points[0].copy()
    people = case.keypoints[0], case.areas[0], case.boxes[0]
    before = similarities(points, *people, case.sigmas)
    points[0, 2], points[1, 0] = np.nan, np.inf
    found = similarities(points, *people, case.sigmas)
    assert found.max() > 0.5
    assert not found[0, :, 2].any()
    assert not found[1, :, 0].any()
    assert np.array_equal(found[2:], before[2:])


def published_nms(points: np.ndarray, scores: np.ndarray, areas: np.ndarray, sigmas: np.ndarray, threshold: float):
    """Return which poses are kept, one pair at a time."""
    left = list(np.argsort(-scores, kind="stable"))
    kept = []
    while left:
        best = left.pop(0)
        kept.append(best)
        far = []
        for other in left:
            area = (areas[best] + areas[other]) / 2 + np.spacing(1)
            gaps = ((points[best] - points[other]) ** 2).sum(1)
            if np.exp(-gaps / (2 * sigmas) ** 2 / area / 2).mean() <= threshold:
                far.append(other)
        left = far
    return kept


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
def test_suppression_keeps_what_the_published_loop_keeps(seed: int, threshold: float) -> None:
    case = random_case(seed, images=1, found=25)
    points, scores = case.points[0], case.scores[0]
    arguments = points, scores, pose_areas(points), case.sigmas, threshold
    assert oks_nms(*arguments).tolist() == published_nms(*arguments)


def test_a_threshold_of_one_keeps_copies_best_first() -> None:
    points = np.ones((3, 4, 2))
    scores, areas = np.array([0.1, 0.7, 0.4]), np.full(3, 50.0)
    assert oks_nms(points, scores, areas, np.full(4, 0.1), 1.0).tolist() == [1, 2, 0]
    assert oks_nms(points, scores, areas, np.full(4, 0.1), 0.99).tolist() == [1]


def test_only_poses_of_one_class_are_duplicates() -> None:
    points, areas, sigmas = np.ones((5, 4, 2)), np.full(5, 50.0), np.full(4, 0.1)
    points[4] += 40
    scores, labels = np.array([0.5, 0.7, 0.7, 0.4, 0.7]), np.array([0, 3, 0, 3, 3])
    assert distinct(points, scores, areas, labels, sigmas, 0.9).tolist() == [1, 2, 4]  # equal scores in the given order
    assert distinct(points[:0], scores[:0], areas[:0], labels[:0], sigmas, 0.9).tolist() == []


def test_area_of_a_pose() -> None:
    points = np.array([[[1.0, 5.0], [4.0, 3.0], [2.0, 9.0]]])
    assert pose_areas(points) == pytest.approx([18.0], abs=FLOAT64)
