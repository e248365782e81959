"""The task of detection: batches, losses, what is measured, what is drawn, and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from widefield import tasks
from widefield.data import Scenes
from widefield.dense import FCOS, Detections, Detector
from widefield.surgery.answers import evaluating
from widefield.tasks import BoxPrediction, Detection, DetectionScores

HEAD = {"neck_channels": 64, "num_convs": 1}
NETWORK: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes("val", size=64, count=4)


@pytest.fixture(scope="module")
def task() -> Detection:
    return Detection(Scenes.object_classes, model="fcos", head_args=HEAD)


@pytest.fixture
def model(task: Detection) -> Detector:
    torch.manual_seed(0)
    import timm

    built = task.model(timm.create_model("convnext_atto", features_only=True, **NETWORK))
    assert isinstance(built, FCOS)
    return built


def shrunk(sample: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Return a val sample whose image is smaller than its file."""
    return {**sample, "image": sample["image"][:, :height, :width]}


def test_images_of_a_batch_are_padded_and_the_rest_is_listed(scenes: Scenes, task: Detection) -> None:
    samples = [shrunk(scenes[0], 50, 64), shrunk(scenes[1], 33, 20)]
    batch = task.collate(samples)
    assert batch["image"].shape == (2, 3, 64, 64)
    assert batch["image_size"].tolist() == [[50, 64], [33, 20]]
    assert batch["size"].tolist() == [[64, 64], [64, 64]]
    assert torch.equal(batch["image"][1, :, :33, :20], samples[1]["image"])
    assert not batch["image"][1, :, 33:].any()
    assert not batch["image"][1, :, :, 20:].any()
    assert "masks" not in batch  # this model has none
    for name in ("boxes", "labels", "crowd", "area"):
        assert [torch.equal(mine, sample[name]) for mine, sample in zip(batch[name], samples, strict=True)] == [
            True
        ] * 2
    with_masks = Detection(Scenes.object_classes, model="mask_rcnn")
    assert [masks.shape[1:] for masks in with_masks.collate([scenes[0]])["masks"]] == [(64, 64)]


def test_the_loss_is_the_sum_of_its_parts(scenes: Scenes, task: Detection, model: Detector) -> None:
    batch = task.collate([scenes[0], scenes[1]])
    losses = task.losses(model, batch)
    assert set(losses) == {"loss_cls", "loss_bbox", "loss_centerness"}
    loss = task.loss(model, batch)
    assert loss.item() == pytest.approx(sum(value.item() for value in losses.values()))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Oracle(torch.nn.Module):
    """Returns fixed detections, in the order in which images come."""

    def __init__(self, found: list[Detections]) -> None:
        super().__init__()
        self.found, self.num_classes, self.calls = found, 8, []

    def forward(self, images: Any, targets: Any = None, *, sizes: Any = None, out_sizes: Any = None) -> Any:
        self.calls.append((sizes, out_sizes))
        return [self.found.pop(0) for _ in images]


def true_detections(scenes: Scenes, index: int, moved: float = 0) -> Detections:
    sample = scenes[index]
    count = len(sample["labels"])
    return Detections(sample["boxes"] + moved, torch.linspace(1, 0.5, count), sample["labels"])


def test_true_boxes_are_perfect_and_moved_ones_are_rated_lower(scenes: Scenes, task: Detection) -> None:
    model = Oracle([true_detections(scenes, 0), true_detections(scenes, 1, moved=4.0)])
    batch = {**task.collate([scenes[0], scenes[1]]), "index": torch.tensor([0, 1])}
    outputs = task.outputs(model, batch)
    assert torch.equal(model.calls[0][0], batch["image_size"])
    assert torch.equal(model.calls[0][1], batch["size"])
    rates = task.rate(outputs)
    assert rates[0] == pytest.approx(1)
    assert rates[1] < 0.9
    metrics = task.metrics()
    metrics.update(**outputs)
    scores = task.scores(metrics)
    assert isinstance(scores, DetectionScores)
    assert {name: float(value) for name, value in metrics.compute().items()} == {
        name: pytest.approx(value, nan_ok=True) for name, value in scores.metrics().items()
    }
    assert 0.3 < scores.metrics()["box_ap"] < 1
    assert scores.classes == Scenes.object_classes


def test_an_image_without_objects_is_not_rated(task: Detection, scenes: Scenes) -> None:
    empty = {
        name: value[:0] if name in ("boxes", "labels", "crowd", "area") else value for name, value in scenes[0].items()
    }
    outputs = task.outputs(Oracle([true_detections(scenes, 0)]), task.collate([empty]))
    assert math.isnan(task.rate(outputs)[0])


def test_what_is_drawn(scenes: Scenes, task: Detection, model: Detector) -> None:
    sample = scenes[2]
    found = task.predict(model, sample["image"][None], [(128, 96)])
    assert isinstance(found[0], BoxPrediction)
    assert found[0].size == (128, 96)
    with evaluating(model), torch.no_grad():
        (expected,) = model(sample["image"][None], out_sizes=[(128, 96)])
    assert torch.equal(found[0].boxes, expected.boxes)
    true = task.truth(sample)
    assert isinstance(true, BoxPrediction)
    assert true.scores is None
    assert true.masks is None
    assert torch.equal(true.boxes, sample["boxes"])


def test_it_is_made_from_a_data_set_or_a_record_of_it(scenes: Scenes) -> None:
    class Record:
        classes = ("cat", "dog")

    made = tasks.create("detection", scenes, model="retinanet")
    assert made.classes == Scenes.object_classes  # type: ignore[attr-defined]
    assert tasks.create("detection", Record()).classes == ("cat", "dog")  # type: ignore[attr-defined]


def test_what_is_wrong_is_named(scenes: Scenes, task: Detection, model: Detector) -> None:
    with pytest.raises(ValueError, match=r"model must be one of .*'fcos'"):
        Detection(["x"], model="fcoss")
    with pytest.raises(ValueError, match="needs the names of the classes of objects"):
        Detection([])
    with pytest.raises(ValueError, match=r"size_bins must be positive and rising; got \[2, 1\]"):
        Detection(["x"], size_bins=[2, 1])
    with pytest.raises(TypeError, match=r"task.args.head_args: FCOS refuses {'neck_chanels': 32}"):
        Detection(["x"], model="fcos", head_args={"neck_chanels": 32}).model(model.backbone)
    boxes_only = {name: value for name, value in scenes[0].items() if name != "masks"}
    with pytest.raises(ValueError, match="mask_rcnn learns masks, and the data set has none"):
        Detection(["x"], model="mask_rcnn").collate([boxes_only])
    with pytest.raises(ValueError, match="Conv2d is not a detector"):
        task.check(torch.nn.Conv2d(3, 3, 1), (3, 32, 32))
    with pytest.raises(ValueError, match="it knows 8 classes, and the data have 1"):
        Detection(["x"]).check(model, (3, 32, 32))
    task.check(model, (3, 32, 32))
