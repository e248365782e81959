"""Poses in whole images: crops around boxes of any origin, and points back in pixels of the image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense.detectors import retinanet, trained
from widefield.dense import Detections, DetectorInput, HeatmapPose, PoseRules, Poses, estimate_poses, find_boxes

MEAN, STD = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)
RULES = PoseRules((64, 48), (0, 2, 1), (0.05, 0.05, 0.05), kind="unbiased", sigma=1.5, blur=3, flip_test=False)


class Colors(nn.Module):
    """A pose model of three key points: the spots of each color. It sees where crops were normalized otherwise.

    Heatmaps are the crops at half of their size, by the convention of "udp" (corners meet) or of the others.
    """

    def __init__(self, *, aligned: bool = False) -> None:
        super().__init__()
        self.aligned = aligned
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, crops: Tensor) -> Tensor:
        mean, std = (crops.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        pixels = (crops * std + mean) * self.scale
        if not self.aligned:
            return pixels[..., ::2, ::2]
        half = (crops.shape[2] // 2, crops.shape[3] // 2)
        return F.interpolate(pixels, half, mode="bicubic", align_corners=True)


def scene(points: Tensor, size: tuple[int, int] = (90, 120), width: float = 4.0) -> Tensor:
    """Return an image (3, H, W) with a spot of each color at points (M, 3, 2)."""
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in size)
    image = torch.zeros(3, *size, dtype=torch.float64)
    for own in points:
        for color, (x, y) in enumerate(own.tolist()):
            spot = torch.exp(-((columns - x) ** 2 + (rows[:, None] - y) ** 2) / (2 * width**2))
            image[color] = torch.maximum(image[color], spot)
    return image


POINTS = torch.tensor([[[30.0, 30], [20, 45], [42, 50]], [[90, 40], [80, 60], [101, 62]]], dtype=torch.float64)
BOXES = torch.tensor([[8.0, 15, 52, 65], [70, 25, 112, 78]])
NORM = {"mean": MEAN, "std": STD}
INPUT = DetectorInput(scale=(240, 180), mean=(0.1, 0.2, 0.1), std=(0.4, 0.5, 0.6))  # not those of the pose model


def poses(boxes: Any, rules: PoseRules = RULES, image: Tensor | None = None, **more: Any) -> Poses:
    model = Colors(aligned=rules.aligned)
    return estimate_poses(model, scene(POINTS) if image is None else image, boxes, rules, **{**NORM, **more})


@pytest.mark.parametrize("kind", ["msra", "unbiased", "udp"])
@pytest.mark.parametrize("flip", [False, True])
def test_points_are_found_where_they_are_in_the_image(kind: str, flip: bool) -> None:
    # Colors of a mirrored crop do not change sides as limbs do: no pair is swapped.
    rules = PoseRules((64, 48), (0, 1, 2), (0.05,) * 3, kind=kind, sigma=2, blur=3, flip_test=flip)
    found = poses(BOXES, rules)
    order = (found.boxes[:, 0] > 60).long()
    assert order.sort().values.tolist() == [0, 1]
    error = (found.points - POINTS[order]).abs().max()
    # A pixel of the crop is at most 1.3 pixels of the image, one of the heatmap twice as much. "msra" reads quarters of
    # the latter. Without "udp", the published shift of mirrored heatmaps is off by a pixel of the crop, which is halved
    # by the average.
    allowed = {"msra": 0.25 * 2, "unbiased": 0.0, "udp": 0.0}[kind] + (0.5 if flip and kind != "udp" else 0.0)
    assert error < 1.3 * allowed + 0.1
    assert found.scores.min() > 0.8
    torch.testing.assert_close(found.pose_scores, found.scores.mean(1))


def test_batches_dtypes_and_the_order_of_boxes_do_not_matter() -> None:
    single = poses(BOXES, batch_size=1)
    both = poses(BOXES.flip(0), batch_size=7)
    torch.testing.assert_close(single.points, both.points)
    torch.testing.assert_close(single.pose_scores, both.pose_scores)
    assert (single.pose_scores.diff() <= 0).all()
    rounded = poses(BOXES, image=(scene(POINTS) * 255).round().to(torch.uint8))
    assert (rounded.points - single.points).abs().max() < 0.1


def test_boxes_come_from_anywhere() -> None:
    scores, labels = torch.tensor([0.9, 0.5]), torch.tensor([3, 1])
    plain = poses(BOXES)
    for given in (Detections(BOXES, scores, labels), {"boxes": BOXES, "scores": scores, "labels": labels}):
        found = poses(given)
        order = [0, 1] if found.labels[0] == 3 else [1, 0]
        assert torch.equal(found.labels, labels[order])
        assert torch.equal(found.box_scores, scores[order])
        torch.testing.assert_close(found.pose_scores, found.scores.mean(1) * found.box_scores)
        assert set(map(tuple, found.boxes.tolist())) == set(map(tuple, plain.boxes.tolist()))
        assert poses(given, classes=[1]).boxes.tolist() == BOXES[1:].tolist()
        assert poses(given, min_score=0.6).boxes.tolist() == BOXES[:1].tolist()
        assert poses(given, classes=[]).points.shape == (0, 3, 2)
    assert not poses(BOXES.clone().requires_grad_()).points.requires_grad  # of a detector that recorded gradients


class Torchvisions(nn.Module):
    """Return detections as torchvision's detectors do, one per image of a list."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert images[0].amax() <= 1
        assert not self.training
        return [{"boxes": BOXES, "scores": torch.tensor([0.9, 0.2]), "labels": torch.tensor([1, 1])}]


def test_a_detector_and_a_pose_model_are_one_call() -> None:
    detector = Torchvisions().train()
    found = poses(detector)
    assert found.boxes.tolist() == BOXES[:1].tolist()  # the other score is too low
    assert detector.training
    own = trained(retinanet()).train()
    own.score_threshold = 0.0
    boxes = find_boxes(own, scene(POINTS).float(), INPUT)
    assert len(boxes.boxes) > 0
    composed = poses(own, image=scene(POINTS).float(), min_score=0.0, detector_input=INPUT)
    by_hand = poses(boxes, image=scene(POINTS).float(), min_score=0.0)
    assert torch.equal(composed.points, by_hand.points)
    assert own.training


def test_boxes_of_a_detector_are_in_pixels_of_the_image() -> None:
    detector = trained(retinanet())
    detector.score_threshold = 0.0
    image = scene(POINTS).float()
    large = find_boxes(detector, image, INPUT)
    mean, std = (image.new_tensor(values)[:, None, None] for values in (INPUT.mean, INPUT.std))
    double = F.interpolate(image[None], scale_factor=2, mode="bilinear") - mean
    with torch.no_grad():
        (expected,) = detector(double / std)
    torch.testing.assert_close(large.boxes, expected.boxes / 2, rtol=1e-4, atol=1e-3)


def test_a_detector_of_this_package_never_runs_on_images_of_a_guessed_form() -> None:
    detector, image = trained(retinanet()), scene(POINTS).float()
    for call in (lambda: poses(detector, image=image), lambda: find_boxes(detector, image)):
        with pytest.raises(ValueError, match=r"a Detector needs detector_input.*DetectorInput\(scale=\(1333, 800\)\)"):
            call()
    with pytest.raises(ValueError, match="Torchvisions resizes and normalizes images itself"):
        poses(Torchvisions(), detector_input=INPUT)
    with pytest.raises(ValueError, match="detector_input is for a detector, and the boxes are given"):
        poses(BOXES, detector_input=INPUT)


def test_a_gray_image_is_one_of_equal_channels() -> None:
    gray = scene(POINTS[:, :1].expand(-1, 3, -1)).float()
    assert torch.equal(poses(BOXES, image=gray[:1]).points, poses(BOXES, image=gray).points)
    detector = trained(retinanet())
    detector.score_threshold = 0.0
    assert torch.equal(find_boxes(detector, gray[:1], INPUT).boxes, find_boxes(detector, gray, INPUT).boxes)


def test_of_the_poses_of_one_thing_the_best_is_kept() -> None:
    twice = torch.cat((BOXES, BOXES + 0.5))
    scores = torch.tensor([0.8, 0.7, 0.9, 0.6])
    found = poses(Detections(twice, scores, torch.zeros(4, dtype=torch.int64)))
    assert found.box_scores.tolist() == pytest.approx([0.9, 0.7])
    classes = poses(Detections(twice, scores, torch.tensor([0, 0, 1, 1])))
    assert len(classes.boxes) == 4  # of different classes
    all_kept = PoseRules(**{**vars(RULES), "nms_threshold": 1.0})
    assert len(poses(twice, all_kept).boxes) == 4


def test_no_boxes_and_boxes_beyond_the_image_give_poses_without_errors() -> None:
    none = poses(torch.zeros(0, 4))
    assert [one.shape[0] for one in none] == [0] * 6
    outside = poses(torch.tensor([[500.0, 500, 520, 540]]))
    assert outside.points.isfinite().all()
    assert outside.scores.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.zeros(1, 3, 8, 8)}, r"image must be \(C, H, W\), one image; got shape \(1, 3, 8, 8\)"),
        ({"image": torch.full((3, 8, 8), 100.0)}, "image must be from 0 to 1.*100"),
        ({"image": torch.zeros(3, 8, 8, dtype=torch.int32)}, "image must be uint8, or floating point"),
        ({"image": [1]}, "image must be a tensor"),
        (
            {"image": torch.zeros(4, 8, 8)},
            r"3 channels.*or 1; got shape \(4, 8, 8\). Drop the alpha channel: image\[:3\]",
        ),
        ({"image": torch.zeros(2, 8, 8)}, r"got shape \(2, 8, 8\). Drop the alpha channel: image\[:1\]"),
        ({"image": torch.zeros(8, 8, 3)}, r"3 channels, as mean and std, or 1; got shape \(8, 8, 3\).$"),
        ({"boxes": torch.zeros(4)}, r"boxes must be \(D, 4\).*\(4,\)"),
        ({"boxes": torch.tensor([[0.0, 0, 5, 5], [9, 2, 4, 8]])}, "box 1 is .9.0, 2.0, 4.0, 8.0."),
        ({"boxes": {"scores": torch.zeros(1)}}, "a mapping of detections needs boxes"),
        ({"boxes": "person"}, "boxes must be a tensor .* got str"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"min_score": 2}, "min_score must be from"),
        ({"classes": ["person"]}, "every entry of classes must be an integer"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"image": scene(POINTS), "boxes": BOXES, **changes}
    with pytest.raises((TypeError, ValueError), match=message):
        estimate_poses(Colors(), given.pop("image"), given.pop("boxes"), RULES, **{**NORM, **given})


def test_rules_of_another_model_are_refused() -> None:
    model = HeatmapPose("test_resnet", 3, channels=(8,), kind="udp")
    with pytest.raises(ValueError, match="the heatmaps of the model have kind 'udp', and the rules 'unbiased'"):
        estimate_poses(model, scene(POINTS), BOXES, RULES)
