"""Multi-label classification: losses, metrics against torchmetrics and by hand, predictions, refusals."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multilabel_average_precision

from tolerances import FLOAT32, FLOAT64, close
from widefield import data, tasks
from widefield.tasks import LabelPrediction, MultiLabelClassification, MultiLabelScores
from widefield.tasks.asymmetric_loss import asymmetric_loss
from widefield.tasks.multilabel import balanced_weights
from widefield.tasks.multilabel_scores import MultiLabelMetric
from widefield.train.loaders import class_shares

CLASSES = ("cat", "dog", "eel", "fox")


def batch(count: int = 6, classes: int = 4) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(count, 3, 8, 8, generator=draw),
        "present": torch.rand(count, classes, generator=draw) < 0.4,
    }


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))


def test_the_losses_are_means_over_classes_and_images(model: nn.Module) -> None:
    found, images = batch(), batch()["image"]
    logits, present = model(images), found["present"]
    plain = MultiLabelClassification(4)
    expected = F.binary_cross_entropy_with_logits(logits, present.float())
    close(plain.loss(model, found), expected, FLOAT32)
    close(plain.image_losses(model, found).mean(), expected, FLOAT32)
    weighted = MultiLabelClassification(4, positive_weights=[1, 2, 3, 0.5]).loss(model, found)
    weight = torch.tensor([1, 2, 3, 0.5])
    close(weighted, F.binary_cross_entropy_with_logits(logits, present.float(), pos_weight=weight), FLOAT32)
    asymmetric = MultiLabelClassification(4, loss="asymmetric").loss(model, found)
    close(asymmetric, asymmetric_loss(logits, present, 0.0, 4.0, 0.05).mean(), FLOAT32)
    other = MultiLabelClassification(4, loss="asymmetric", gamma_pos=1, gamma_neg=2, margin=0).loss(model, found)
    close(other, asymmetric_loss(logits, present, 1.0, 2.0, 0.0).mean(), FLOAT32)


def measured(logits: Tensor, present: Tensor, parts: int = 1, threshold: float = 0.5) -> MultiLabelScores:
    metric = MultiLabelMetric(CLASSES, threshold)
    for mine, theirs in zip(logits.chunk(parts), present.chunk(parts), strict=True):
        metric.update(mine, theirs)
    return metric.scores()


def test_average_precision_is_torchmetrics_over_the_classes_that_images_show() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 4, generator=draw).round(decimals=1)  # with ties
    present = torch.rand(200, 4, generator=draw) < logits.sigmoid() * 0.5
    present[:, 2] = False
    found = measured(logits, present, parts=3)
    known = [0, 1, 3]
    expected = multilabel_average_precision(logits[:, known], present[:, known].long(), 3, average=None)
    close(found.average_precision[known].float(), expected, FLOAT32)
    assert found.average_precision[2].isnan()
    macro = multilabel_average_precision(logits[:, known], present[:, known].long(), 3, average="macro")
    assert found.metrics()["map"] == pytest.approx(float(macro), rel=1e-5)
    assert found.images == 200
    assert found.rows()[2] == {
        "class": "eel",
        "images": "0",
        "AP": "-",
        "precision": "0.0%",
        "recall": "-",
        "F1": "0.0%",
    }
    assert found.weakest(1)[0]["class"] == CLASSES[known[int(expected.argmin())]]
    assert found.weakest(4)[-1]["class"] == "eel"


def test_large_logits_keep_their_order() -> None:
    logits = torch.tensor([[30.0], [29.0], [28.0], [-30.0]])  # all but one are 1 in float32
    metric = MultiLabelMetric(("cat",), 0.5)
    metric.update(logits, torch.tensor([[True], [False], [True], [False]]))
    assert metric.scores().average_precision.tolist() == pytest.approx([(1 + 2 / 3) / 2])


def test_f1_is_as_by_hand() -> None:
    #                cat    dog    eel    fox: never given, never shown
    present = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0]]).bool()
    given = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0]]).bool()
    found = measured(torch.where(given, 2.0, -2.0), present)
    assert found.counts.tolist() == [[2, 3, 3], [0, 1, 1], [2, 2, 2], [0, 0, 0]]
    precision, recall = (2 / 3 + 0 + 1) / 3, (2 / 3 + 0 + 1) / 3
    assert found.metrics()["cf1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found.metrics()["of1"] == pytest.approx(2 * 4 / (6 + 6))
    assert found.f1[0] == pytest.approx(2 / 3)
    higher = measured(torch.where(given, 2.0, -2.0), present, threshold=0.95)
    assert higher.metrics()["cf1"] == higher.metrics()["of1"] == 0
    assert "from a probability of 0.95" in higher.summary()
    assert found.to_dict()["f1"][3] is None
    assert found.to_dict()["images"] == [3, 1, 2, 0]


def test_without_a_class_in_any_image_there_is_no_number() -> None:
    found = measured(torch.zeros(3, 4), torch.zeros(3, 4).bool())
    assert all(np.isnan(value) for value in found.metrics().values())
    assert found.to_dict()["metrics"] == dict.fromkeys(("map", "cf1", "of1"))


def test_records_of_several_processes_are_as_those_of_one() -> None:
    found = batch(9)
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))
    whole, first, second = (MultiLabelMetric(CLASSES, 0.5) for _ in range(3))
    whole.update(logits, found["present"])
    first.update(logits[:4], found["present"][:4])
    second.update(logits[4:], found["present"][4:])
    first.images += pickle.loads(pickle.dumps(second)).images
    assert first.compute() == whole.compute()


def test_the_task_measures_and_rates(model: nn.Module) -> None:
    task = MultiLabelClassification(4, class_names=CLASSES)
    found = batch()
    outputs = task.outputs(model, found)
    metrics = task.metrics()
    metrics.update(**outputs)
    assert set(metrics.compute()) == {"loss", "map", "cf1", "of1"}
    assert task.headline == "map"
    assert task.scores(metrics).classes == CLASSES
    right = torch.where(found["present"], outputs["preds"].double().sigmoid(), (-outputs["preds"].double()).sigmoid())
    close(task.rate(outputs), right.log().mean(1).exp(), FLOAT64)
    share = found["present"].double().mean(0)
    blind = -(share * share.log() + (1 - share) * (1 - share).log())
    assert task.blind_loss([found]) == pytest.approx(float(blind.nan_to_num(0.0).mean()))


def test_images_get_the_classes_from_the_threshold_on(model: nn.Module) -> None:
    task = MultiLabelClassification(4, threshold=0.6)
    found = batch()
    predictions = task.predict(model, found["image"], [(8, 8)] * 6)
    for one, logits in zip(predictions, model(found["image"]), strict=True):
        assert isinstance(one, LabelPrediction)
        close(one.probabilities, logits.sigmoid().detach(), FLOAT32)
        assert sorted(one.labels) == (logits.sigmoid() >= 0.6).nonzero().flatten().tolist()
        assert one.probabilities[one.labels].tolist() == sorted(one.probabilities[one.labels].tolist(), reverse=True)
    assert task.truth({"present": torch.tensor([True, False, True, False])}).labels == [0, 2]


def test_balanced_weights_are_absences_per_presence() -> None:
    present = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]], dtype=bool)
    dataset: Any = SimpleNamespace(present=present)
    assert balanced_weights(dataset) == [1 / 4, 3, 3]
    scenes = data.SceneLabels("train", count=8, size=32)
    made = tasks.create("multilabel", scenes, positive_weights="balanced")
    found = {"image": torch.zeros(1, 3, 8, 8), "present": torch.ones(1, 8).bool()}
    weights = torch.tensor(balanced_weights(scenes))
    logits = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    nn.init.zeros_(logits[1].bias)
    close(made.loss(logits, found), (weights * np.log(2)).mean().float(), FLOAT32)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gamma without the loss": ({"gamma_neg": 2}, "gamma_neg is of loss: asymmetric; set it, or leave gamma_neg out"),
    "weights with it": (
        {"loss": "asymmetric", "positive_weights": "balanced"},
        "positive_weights are for loss: binary",
    ),
    "too few weights": ({"positive_weights": [1, 2]}, r"balanced, or 4 numbers.*got \[1, 2\]"),
    "unknown loss": ({"loss": "focal"}, "loss must be one of 'binary', 'asymmetric'; got 'focal'"),
    "threshold": ({"threshold": 1.5}, "threshold must be from 0.0 to 1.0; got 1.5"),
    "threshold 0": ({"threshold": 0}, "threshold must be above 0"),
    "margin": ({"loss": "asymmetric", "margin": 1}, "margin must be below 1"),
    "names": ({"class_names": ["a"]}, "class_names must be 4 names; got 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_refused(case: str) -> None:
    options, text = REFUSED[case]
    with pytest.raises(ValueError, match=text):
        MultiLabelClassification(4, **options)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda few: tasks.create("multilabel", data.Scales("val", count=4)), "Scales has others.*task classification"),
        (
            lambda few: tasks.create("classification", few),
            "those of SceneLabels have any number: use the task multilabel",
        ),
        (lambda few: class_shares(few, 0.5), "SceneLabels has no `labels`: leave it out"),
        (
            lambda few: MultiLabelClassification(4).learn_from(lambda x: x, weight=0.5),
            "distillation is for classification",
        ),
        (lambda few: MultiLabelClassification(4, positive_weights="balanced").loss(nn.Flatten(), batch()), "for_data"),
        (
            lambda few: MultiLabelClassification(3).check(nn.Flatten(), (1, 2, 2)),
            "gives 4 outputs, and the task needs 3",
        ),
    ],
    ids=["one label", "several labels", "sampling", "distillation", "balanced without data", "outputs"],
)
def test_what_does_not_go_together_is_refused(call: Callable[[Any], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(data.SceneLabels("val", count=4, size=32))


def test_class_weights_are_named_after_the_option_that_there_is() -> None:
    with pytest.raises(TypeError, match=r"has no option 'class_weights'.*positive_weights"):
        tasks.create("multilabel", data.SceneLabels("val", count=2, size=32), class_weights="balanced")
