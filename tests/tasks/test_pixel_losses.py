"""Losses at every pixel, against numpy loops in float64 over single pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tolerances import FLOAT64, close
from widefield.tasks.pixel_losses import cross_entropy, dice_loss, hard_pixels

EPS = 1.1920928955078125e-07

SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(1, 7), st.integers(1, 7))


def case(shape: tuple[int, int, int, int], seed: int, ignored: float) -> tuple[Tensor, Tensor]:
    """Return logits (N, K, H, W) and a mask with a share of ignored pixels."""
    draw = np.random.default_rng(seed)
    n, k, h, w = shape
    mask = draw.integers(0, k, (n, h, w))
    mask[draw.random((n, h, w)) < ignored] = 255
    return torch.from_numpy(draw.normal(0, 2, shape)), torch.from_numpy(mask)


def pixels(logits: Tensor, mask: Tensor) -> list[tuple[int, float]]:
    """Return (class, cross-entropy) of every pixel with a class, in order."""
    found = []
    for n, y, x in np.ndindex(*mask.shape):
        label = int(mask[n, y, x])
        if label != 255:
            values = logits[n, :, y, x].numpy()
            found.append((label, float(np.log(np.exp(values - values.max()).sum()) + values.max() - values[label])))
    return found


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 999), st.sampled_from([0.0, 0.3, 1.0]), st.booleans(), st.booleans())
def test_cross_entropy(shape: Any, seed: int, ignored: float, weighted: bool, avg_non_ignore: bool) -> None:
    logits, mask = case(shape, seed, ignored)
    weights = [1.0 + 0.5 * k for k in range(shape[1])] if weighted else None
    each = pixels(logits, mask)
    weigh = weights or [1.0] * shape[1]
    total = sum(weigh[label] * loss for label, loss in each)
    count = sum(weigh[label] for label, _ in each) if avg_non_ignore or weighted else mask.numel()
    found = cross_entropy(logits, mask, class_weights=weights, avg_non_ignore=avg_non_ignore)
    close(found, torch.tensor(total / (count + EPS), dtype=torch.float64), FLOAT64)


def test_the_default_denominator_counts_ignored_pixels() -> None:
    """The mean differs from torch's by the share of labeled pixels."""
    logits, mask = case((2, 4, 9, 5), 0, 0.5)
    share = (mask != 255).double().mean()
    expected = F.cross_entropy(logits, mask, ignore_index=255) * share
    assert cross_entropy(logits, mask).item() == pytest.approx(expected.item(), rel=1e-7)
    own = cross_entropy(logits, mask, avg_non_ignore=True)
    assert own.item() == pytest.approx(F.cross_entropy(logits, mask, ignore_index=255).item(), rel=1e-7)


@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_class_weights_give_the_weighted_mean_of_mmsegmentation_1(avg_non_ignore: bool) -> None:
    """Without ignored pixels, where mmsegmentation 1.2.2 has a result; weights times a number change nothing."""
    logits, mask = case((2, 4, 9, 5), 0, 0.0)
    weights = [0.2, 3.0, 1.0, 0.0]
    expected = F.cross_entropy(logits, mask, weight=logits.new_tensor(weights))
    for factor in (1, 7):
        found = cross_entropy(
            logits, mask, class_weights=[factor * weight for weight in weights], avg_non_ignore=avg_non_ignore
        )
        assert found.item() == pytest.approx(expected.item(), rel=1e-7)


def test_a_batch_without_a_labeled_pixel_has_loss_zero_and_zero_gradients() -> None:
    logits, mask = case((1, 3, 4, 4), 0, 1.0)
    logits.requires_grad_()
    loss = cross_entropy(logits, mask) + cross_entropy(logits, mask, avg_non_ignore=True) + dice_loss(logits, mask)
    loss = loss + cross_entropy(logits, mask, class_weights=[1.0, 2.0, 3.0])
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 999), st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([None, 0.2, 0.7]), st.data())
def test_hard_pixels(shape: Any, seed: int, ignored: float, threshold: float | None, draw: Any) -> None:
    logits, mask = case(shape, seed, ignored)
    min_kept = draw.draw(st.integers(1, 1 + shape[2] * shape[3]))
    losses = np.array([loss for _, loss in pixels(logits, mask)])
    count = min_kept * shape[0]
    if threshold is None:
        kept = np.isin(np.arange(len(losses)), np.argsort(-losses)[:count])
    else:
        shares = np.exp(-losses)
        least = np.sort(shares)[min(count, len(shares) - 1)] if len(shares) else 0.0
        kept = shares < max(least, threshold)
    found = hard_pixels(logits, mask, threshold=threshold, min_kept=min_kept)
    assert not found[mask == 255].any()
    assert np.array_equal(found[mask != 255].numpy(), kept)


def test_the_loss_of_hard_pixels_is_still_a_mean_over_all() -> None:
    logits, mask = case((2, 4, 6, 6), 3, 0.2)
    chosen = hard_pixels(logits, mask, threshold=None, min_kept=5)
    assert chosen.sum() == 10
    largest = sorted((loss for _, loss in pixels(logits, mask)), reverse=True)[:10]
    found = cross_entropy(logits, mask, chosen=chosen)
    close(found, torch.tensor(sum(largest) / (mask.numel() + EPS), dtype=torch.float64), FLOAT64)


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(0, 999), st.sampled_from([0.0, 0.4]))
def test_dice(shape: Any, seed: int, ignored: float) -> None:
    logits, mask = case(shape, seed, ignored)
    shares, values = logits.softmax(1).numpy(), []
    for n in range(shape[0]):
        for k in range(shape[1]):
            valid = mask[n].numpy() != 255
            p, t = shares[n, k][valid], mask[n].numpy()[valid] == k
            values.append(1 - (2 * (p * t).sum() + 1) / ((p**2).sum() + t.sum() + 1))
    close(dice_loss(logits, mask), torch.tensor(np.mean(values)), FLOAT64)
