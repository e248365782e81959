"""Class weights, and images drawn by class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from train.helpers import log, same_weights
from widefield import data
from widefield.data import Sample, SampleSet
from widefield.tasks import Classification
from widefield.tasks.classification import balanced_weights
from widefield.train import RunResult, TaskSpec
from widefield.train.loaders import EpochSampler, class_shares

Run = Callable[..., RunResult]

LABELS = np.array([0] * 12 + [1] * 3 + [2])


class Uneven(data.Digits):
    """Sixteen images of three classes."""

    def __init__(self) -> None:
        super().__init__("train")
        self.classes = ("a", "b", "c")
        self.labels = LABELS.tolist()


class Unlabeled(SampleSet):
    """Images without labels."""

    def __init__(self) -> None:
        super().__init__("train", 0)

    def __len__(self) -> int:
        return 4

    def sample(self, index: int) -> Sample:
        return {"image": torch.zeros(3, 4, 4)}


class Linear(nn.Module):
    """Computes logits from the mean color."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(image.mean((2, 3)))
        return logits


@pytest.mark.parametrize(("power", "expected"), [(1.0, [12, 3, 1]), (0.0, [1, 1, 1]), (0.5, [12**0.5, 3**0.5, 1])])
def test_classes_are_drawn_in_proportion_to_a_power_of_their_size(power: float, expected: list[float]) -> None:
    shares = class_shares(Uneven(), power)
    by_class = np.bincount(LABELS, shares)
    np.testing.assert_allclose(by_class, np.array(expected) / sum(expected))
    sampler = EpochSampler(len(LABELS), 3, shares=shares)
    drawn: Counter[int] = Counter()
    for epoch in range(400):
        sampler.set_epoch(epoch)
        visits = list(sampler)
        assert len(visits) == len(set(visits)) == len(LABELS)  # an image that comes again is on another visit
        drawn.update(LABELS[visit % len(LABELS)] for visit in visits)
    seen = np.array([drawn[label] for label in range(3)]) / drawn.total()
    np.testing.assert_allclose(seen, by_class, atol=0.03)  # six standard deviations of 6400 draws


def test_drawing_is_a_function_of_seed_and_epoch_from_any_start() -> None:
    shares = class_shares(Uneven(), 0.0)
    sampler, again = (EpochSampler(len(LABELS), 3, repeats=2, shares=shares) for _ in range(2))
    whole = list(sampler)
    again.start = 5
    assert list(again) == whole[5:]
    assert len(set(whole)) == len(whole)
    sampler.set_epoch(1)
    assert list(sampler) != whole


def test_a_run_that_draws_by_class_resumes_exactly(run: Run, stop_at: Any) -> None:
    whole = run(name="whole", class_sampling=0.0)
    stop_at(8)
    part = run(class_sampling=0.0)
    rest = run(resume=part.folder, class_sampling=0.0)
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    np.testing.assert_allclose(balanced_weights(Uneven()), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_loss_is_torchs(smoothing: float) -> None:
    model, weights = Linear(), [0.5, 2.0, 1.0]
    batch = {"image": torch.rand(5, 3, 4, 4), "label": torch.tensor([0, 1, 2, 2, 1])}
    loss = Classification(3, class_weights=weights, label_smoothing=smoothing).loss(model, batch)
    expected = F.cross_entropy(model(batch["image"]), batch["label"], torch.tensor(weights), label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)


def test_weighted_loss_of_mixed_images() -> None:
    """With all weights equal it is the loss without weights; and a class of weight 0 has no gradient of its own."""
    model = Linear()
    batch = {"image": torch.rand(6, 3, 4, 4), "label": torch.tensor([0, 1, 2, 2, 1, 0])}
    losses = []
    for weights in (None, [3.0, 3.0, 3.0]):
        np.random.seed(0)
        losses.append(Classification(3, mixup=0.8, class_weights=weights).loss(model, batch))
    torch.testing.assert_close(*losses)
    only = {**batch, "label": torch.zeros(6, dtype=torch.int64)}
    np.random.seed(0)
    loss = Classification(3, mixup=0.8, class_weights=[1.0, 0.0, 0.0]).loss(model, only)
    torch.testing.assert_close(loss, -model(batch["image"]).log_softmax(1)[:, 0].mean(), atol=0.05, rtol=0)


def test_recipes_balance_by_the_train_set(run: Run) -> None:
    result = run(task=TaskSpec(args={"class_weights": "balanced"}), epochs=1)
    plain = run(name="plain", epochs=1)  # the set has as many images of each class: every weight is 1
    assert same_weights(result.model, plain.model)


def test_what_cannot_be_balanced_is_refused() -> None:
    with pytest.raises(ValueError, match="Unlabeled has no `labels`"):
        class_shares(Unlabeled(), 0.5)
    with pytest.raises(ValueError, match="Unlabeled has no `labels`"):
        balanced_weights(Unlabeled())
    with pytest.raises(ValueError, match="class_weights must be balanced, or 3 numbers"):
        Classification(3, class_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="the binary loss has none"):
        Classification(3, class_weights=[1.0, 2.0, 1.0], loss="binary")
    task = Classification.for_data(SimpleNamespace(classes=("a", "b")), class_weights="balanced")
    with pytest.raises(ValueError, match="needs the train set"):
        task.loss(Linear(), {"image": torch.rand(2, 3, 4, 4), "label": torch.tensor([0, 1])})
