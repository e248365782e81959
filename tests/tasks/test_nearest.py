"""Accuracy of nearest neighbors: against a plain loop, and over several updates."""

import math

import pytest
import torch
import torch.nn.functional as F

from widefield.tasks import NearestNeighbors


def _plain(features, target, classes, neighbors):
    features = F.normalize(features, dim=1)
    right = 0
    for row in range(len(features)):
        others = [k for k in range(len(features)) if k != row]
        likeness = {k: float(features[row] @ features[k]) for k in others}
        nearest = sorted(others, key=lambda k: -likeness[k])[:neighbors]
        votes = [sum(math.exp(likeness[k] / 0.07) for k in nearest if target[k] == c) for c in range(classes)]
        right += int(votes.index(max(votes)) == target[row])
    return right / len(features)


@pytest.mark.parametrize("neighbors", [1, 3, 100])
def test_it_equals_a_plain_loop(neighbors):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(4, (60,), generator=generator)
    features = F.one_hot(target, 4).float() + torch.randn(60, 4, generator=generator)
    metric = NearestNeighbors(4, neighbors)
    for part in (slice(0, 7), slice(7, 40), slice(40, 60)):
        metric.update(features[part], target[part])
    expected = _plain(features, target.tolist(), 4, neighbors)
    assert float(metric.compute()) == pytest.approx(expected)
    assert 0.3 < expected < 1


def test_more_images_than_fit_into_one_block():
    target = torch.arange(2500) % 5
    features = F.one_hot(target, 5).float() + 0.01 * torch.randn(2500, 5, generator=torch.Generator().manual_seed(1))
    metric = NearestNeighbors(5)
    metric.update(features, target)
    assert float(metric.compute()) == 1
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert math.isnan(float(metric.compute()))
    metric.reset()
    metric.update(features[:1], target[:1])
    assert math.isnan(float(metric.compute()))
