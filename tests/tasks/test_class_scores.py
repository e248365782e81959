"""Accuracy by class, and what is mistaken for what."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy.stats import binomtest

from widefield.tasks import Classification, ClassificationScores
from widefield.tasks.class_scores import MOST_CLASSES

NAMES = ("ape", "bee", "cat", "dog")


def scores() -> ClassificationScores:
    """Ten apes, of which two are taken for bees; three bees; no cat, but a dog is taken for one; four dogs."""
    return ClassificationScores(NAMES, torch.tensor([[8, 2, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0], [0, 0, 1, 3]]))


def test_rows_have_accuracy_precision_and_the_most_frequent_mistake() -> None:
    ape, bee, cat, dog = scores().rows()
    assert (ape["images"], ape["accuracy"], ape["precision"]) == ("10", "80.0%", "100.0%")
    assert (ape["mistaken for"], ape["in"]) == ("bee", "20.0%")
    assert (bee["accuracy"], bee["precision"], bee["mistaken for"]) == ("100.0%", "60.0%", "-")
    assert (cat["images"], cat["accuracy"], cat["95 %"], cat["precision"]) == ("0", "-", "-", "0.0%")
    assert (dog["accuracy"], dog["mistaken for"]) == ("75.0%", "cat")
    assert [row["class"] for row in scores().weakest(3)] == ["dog", "ape", "bee"]
    assert "top-1 82.4% of 17 images; mean over classes 85.0%" in scores().summary()


def test_intervals_are_wilsons() -> None:
    for (low, high), right, count in zip(scores().intervals().tolist(), (8, 3, 0, 3), (10, 3, 0, 4), strict=True):
        if count:
            expected = binomtest(right, count).proportion_ci(method="wilson")
            assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
        else:
            assert math.isnan(low)


def test_to_dict_is_json() -> None:
    content = json.loads(json.dumps(scores().to_dict(), allow_nan=False))
    assert content["accuracy"] == [0.8, 1.0, None, 0.75]
    assert content["confusion"][0] == [8, 2, 0, 0]


def test_the_task_counts_over_batches() -> None:
    torch.manual_seed(0)
    task = Classification(4, class_names=NAMES)
    metrics = task.metrics()
    logits, labels = torch.randn(50, 4), torch.randint(4, (50,))
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for true, mine in zip(labels.tolist(), logits.argmax(1).tolist(), strict=True):
        expected[true, mine] += 1
    for part in range(0, 50, 13):
        value = torch.zeros(len(labels[part : part + 13]))
        metrics.update(preds=logits[part : part + 13], target=labels[part : part + 13], value=value)
    found = task.scores(metrics)
    assert found is not None
    assert torch.equal(found.confusion, expected)
    assert set(metrics.compute()) == {"loss", "top1"}
    assert float(metrics.compute()["top1"]) == pytest.approx(found.metrics()["top1"])


def test_very_many_classes_are_not_counted() -> None:
    task = Classification(MOST_CLASSES + 1)
    assert task.scores(task.metrics()) is None


def test_an_image_is_rated_by_its_true_class() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    rated = Classification(3).rate({"preds": logits, "target": torch.tensor([0, 1])})
    assert rated.tolist() == pytest.approx([math.exp(2) / (math.exp(2) + 2), 1 / (math.exp(5) + 2)])


def test_names_of_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="class_names must be 3 names; got 2"):
        Classification(3, class_names=["a", "b"])
