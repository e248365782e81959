"""The task of pose estimation: batches, loss, poses in pixels of the file, what is measured, and its errors."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

from tolerances import FLOAT64
from widefield import tasks
from widefield.data.crops import apply_matrix, crop_box, crop_matrix
from widefield.data.skeleton import Skeleton
from widefield.dense import HeatmapCodec, HeatmapPose
from widefield.tasks import PoseEstimation, PosePrediction

SKELETON = Skeleton(("middle", "left", "right", "top", "bottom"), (0, 2, 1, 3, 4), (0.05,) * 5, links=((0, 1), (0, 2)))
SIZE = (96, 64)
NETWORK: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}


def made_samples(udp: bool = False, people: int = 3) -> list[dict[str, Any]]:
    """Return val samples of two files, with the key points of people in boxes, as `widefield.data.PoseSet` has them."""
    draw = torch.Generator().manual_seed(3)
    samples = []
    for file in range(2):
        start = torch.rand(people, 2, generator=draw) * 100
        sides = 30 + torch.rand(people, 2, generator=draw) * 60
        boxes = torch.cat([start, start + sides], 1)
        points = start[:, None] + torch.rand(people, 5, 2, generator=draw) * sides[:, None]
        visible = torch.full((people, 5, 1), 2.0)
        visible[0, 3] = 0
        truth = torch.cat([points * (visible > 0), visible], 2)
        center, scale = crop_box(boxes, SIZE)
        matrices = crop_matrix(center, scale, SIZE, udp=udp)
        inside = apply_matrix(truth[..., :2].double(), matrices).float() * (visible > 0)
        area = sides.prod(1) * 0.5
        for row in range(people):
            shown = slice(None) if row == 0 else slice(0)
            samples.append(
                {
                    "image": torch.randn(3, *SIZE, generator=draw), "affine": matrices[row],
                    "keypoints": torch.cat([inside[row], visible[row]], 1), "truth": truth[row],
                    "label": torch.tensor(0), "box": boxes[row], "box_score": torch.tensor(1.0), "area": area[row],
                    "image_id": torch.tensor(file), "size": torch.tensor([200, 210]),
                    "people": truth[shown], "people_boxes": boxes[shown], "people_area": area[shown],
                    "people_labels": torch.zeros(people, dtype=torch.int64)[shown],
                    "people_crowd": torch.zeros(people, dtype=torch.bool)[shown],
                }
            )  # fmt: skip
    return samples


class Oracle(torch.nn.Module):
    """Gives the target heatmaps of a batch, and those of its mirror images when called again."""

    def __init__(self, task: PoseEstimation, keypoints: torch.Tensor, size: tuple[int, int] = (48, 32)) -> None:
        super().__init__()
        rules = task.rules
        codec = HeatmapCodec(rules.crop_size, size, rules.sigma, rules.kind, rules.blur)
        self.heatmaps, _ = codec.encode(keypoints[..., :2].double(), keypoints[..., 2] > 0)
        turned = self.heatmaps[:, list(rules.swapped)]
        if rules.kind != "udp":  # the flip test moves them back
            turned = torch.cat((turned[..., 1:], turned[..., -1:]), 3)
        self.mirrored = turned.flip(3)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.heatmaps if self.calls % 2 else self.mirrored


def made_task(**options: Any) -> PoseEstimation:
    return PoseEstimation(SKELETON, SIZE, udp=options.get("kind") == "udp", **{"channels": [8, 8], **options})


@pytest.fixture
def model() -> HeatmapPose:
    torch.manual_seed(0)
    built = made_task().model(timm.create_model("convnext_atto", features_only=True, **NETWORK))
    assert isinstance(built, HeatmapPose)
    return built


@pytest.mark.parametrize(("kind", "within"), [("msra", 2.5), ("unbiased", 0.1), ("udp", 0.1)])
def test_perfect_heatmaps_give_the_true_poses_in_the_file(kind: str, within: float) -> None:
    """The way to the crop, the heatmap and back; a heatmap's pixel is up to four pixels of these files."""
    task = made_task(kind=kind)
    samples = made_samples(udp=kind == "udp")
    batch = {**task.collate(samples), "index": torch.arange(len(samples))}
    outputs = task.outputs(Oracle(task, batch["keypoints"]), batch)
    labeled = batch["truth"][..., 2] > 0
    gaps = (outputs["preds"].points - batch["truth"][..., :2]).norm(dim=-1)[labeled]
    assert gaps.max() < within
    metrics = task.metrics()
    metrics.update(**outputs)
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values["oks_ap"] == (1.0 if kind != "msra" else pytest.approx(0.9, abs=0.1))
    assert values["pck20"] == 1.0
    assert values["epe"] == pytest.approx(gaps.mean().item(), abs=FLOAT64)
    rated = task.rate(outputs)
    assert rated.dtype == torch.float64
    assert rated.min() > (0.99 if kind != "msra" else 0.7)
    scores = task.scores(metrics)
    assert scores.people.tolist() == [6]
    assert scores.by_keypoint.count.tolist() == [6, 6, 6, 4, 6]
    assert scores.metrics() == pytest.approx(values, nan_ok=True)


def test_a_detector_s_boxes_and_a_file_without_any(model: HeatmapPose) -> None:
    task = made_task()
    samples = [dict(one) for one in made_samples()]
    for one in samples:
        one["truth"] = torch.zeros(5, 3)
    samples[0]["box_score"] = torch.tensor(0.5)
    samples[3]["box_score"] = torch.tensor(math.nan)  # the second file has people, and this crop stands for no box
    batch = task.collate([samples[0], samples[3]])
    with torch.no_grad():
        outputs = task.outputs(model.eval(), batch)
    assert outputs["preds"].scores.isnan().tolist() == [False, True]
    assert task.rate(outputs).isnan().all()
    metrics = task.metrics()
    metrics.update(**outputs)
    scores = task.scores(metrics)
    assert scores.people.tolist() == [6]
    assert math.isnan(scores.distances["pck"])
    assert scores.figures["ar"] < 0.5


def test_the_loss_is_the_published_one(model: HeatmapPose) -> None:
    task = made_task(sigma=1.5)
    batch = task.collate(made_samples())
    assert batch["image"].shape == (6, 3, *SIZE)
    assert [len(one) for one in batch["people"]] == [3, 0, 0, 3, 0, 0]
    batch["keypoints"][1, 2, :2] = torch.tensor([-100.0, 5.0])  # its peak has no pixel in the heatmap
    model.train()
    loss = task.loss(model, batch)
    with torch.no_grad():
        heatmaps = model.eval()(batch["image"])  # no dropout, and batch norms of batches: compare in one mode
    assert heatmaps.shape == (6, 5, 12, 8)
    total = torch.zeros((), dtype=torch.float64)
    oracle = task.loss(model, batch)
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(8.0), indexing="ij")
    for n in range(6):
        for k in range(5):
            px, py, seen = batch["keypoints"][n, k].tolist()
            cx, cy = (math.floor(value / 8 + 0.5) for value in (px, py))
            if seen and (n, k) != (1, 2):
                peak = torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * 1.5**2))
                near = ((x - cx).abs() <= 4.5) & ((y - cy).abs() <= 4.5)
                total += ((heatmaps[n, k] - peak * near) ** 2).sum()
    assert oracle.item() == pytest.approx(total.item() / heatmaps.numel(), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_is_drawn(model: HeatmapPose) -> None:
    task = made_task(flip_test=False)
    image = made_samples()[0]["image"][None]
    (found,) = task.predict(model.train(), image, [(200, 100)])
    assert isinstance(found, PosePrediction)
    assert model.training
    with torch.no_grad():
        read = task.rules.decode(model.eval()(image))
    # The crop of 64 x 96 is enlarged; the center of the first pixel is (0, 0) before and after.
    scale = torch.tensor([100 / 64, 200 / 96])
    assert torch.allclose(found.keypoints, (read.points + 0.5) * scale - 0.5, atol=1e-4)
    assert found.boxes.tolist() == [[0, 0, 100, 200]]
    assert found.size == (200, 100)
    assert len(found.at_least(float(found.pose_scores) + 1e-3)) == 0
    sample = made_samples()[0]
    true = task.truth(sample)
    assert isinstance(true, PosePrediction)
    assert true.pose_scores is None
    assert torch.equal(true.keypoints[0], sample["keypoints"][:, :2])  # as they are in the crop that is drawn
    assert true.size == (96, 64)
    assert true.visible.tolist() == [[2, 2, 2, 0, 2]]
    assert true.at_least(0.9) is true


@pytest.mark.parametrize("kind", ["unbiased", "udp"])
def test_predicted_poses_are_in_pixels_of_the_crop(kind: str) -> None:
    task, samples = made_task(kind=kind, flip_test=False), made_samples(udp=kind == "udp")
    batch = task.collate(samples)
    inside = batch["keypoints"][..., 2] > 0
    found = task.predict(Oracle(task, batch["keypoints"]), batch["image"], [SIZE] * len(samples))
    points = torch.cat([one.keypoints for one in found if isinstance(one, PosePrediction)])
    labels = batch["keypoints"][..., :2]
    inside &= ((labels > 4) & (labels < torch.tensor([60.0, 92.0]))).all(2)  # whole peaks
    assert inside.sum() > 10
    assert (points - labels)[inside].abs().max() < 0.1


def test_it_is_made_from_a_data_set_or_a_record_of_it() -> None:
    record = SimpleNamespace(skeleton=SKELETON, crop_size=(96, 64), classes=("dog",), udp=True, padding=1.5)
    task = tasks.create("pose", record, kind="udp", channels=[16])
    assert isinstance(task, PoseEstimation)
    assert (task.rules.crop_size, task.rules.padding, task.rules.aligned) == ((96, 64), 1.5, True)
    assert task.classes == ("dog",)


def test_what_is_wrong_is_named(model: HeatmapPose) -> None:
    with pytest.raises(ValueError, match=r"'pose' needs crops of people with key points, and SimpleNamespace gives"):
        tasks.create("pose", SimpleNamespace(classes=("x",)))
    with pytest.raises(ValueError, match=r"kind is 'udp', and the crops of the data are cut without udp"):
        PoseEstimation(SKELETON, SIZE, kind="udp")
    with pytest.raises(ValueError, match=r"kind is 'msra', and the crops of the data are cut with udp"):
        PoseEstimation(SKELETON, SIZE, udp=True)
    with pytest.raises(ValueError, match=r"kind must be one of .*Did you mean 'unbiased'"):
        made_task(kind="unbiassed")
    with pytest.raises(ValueError, match=r"size_bins must be positive and rising; got \[2, 1\]"):
        made_task(size_bins=[2, 1])
    with pytest.raises(ValueError, match=r"head_args.sigma is an option of the task itself: write task.args.sigma"):
        made_task(head_args={"sigma": 3})
    with pytest.raises(TypeError, match=r"channels must be a list such as \[256, 256, 256\]; got 256"):
        made_task(channels=256)
    with pytest.raises(TypeError, match=r"task.args.head_args: HeatmapPose refuses .*deep"):
        made_task(head_args={"deep": 3}).model(model.backbone)
    task = made_task()
    task.check(model, (3, *SIZE))
    with pytest.raises(ValueError, match="it gives 7 heatmaps, and the data have 5 key points"):
        task.check(torch.nn.Conv2d(3, 7, 1), (3, *SIZE))
    with pytest.raises(ValueError, match="it gives no heatmaps"):
        task.check(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(5)), (3, *SIZE))
    with pytest.raises(ValueError, match=r"its heatmaps have sigma 2\.0, and the task's 3"):
        made_task(sigma=3).check(model, (3, *SIZE))
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="batch of 1 is too small to train a batch norm"):
        task.loss(network, task.collate(made_samples()[:1]))
    with pytest.raises(ValueError, match="measured on val samples, which have the entry 'people'; these have none"):
        task.outputs(model, task.collate([{k: v for k, v in made_samples()[0].items() if "people" not in k}]))
