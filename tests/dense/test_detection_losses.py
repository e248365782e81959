"""Losses of detectors equal torchvision's and the papers' formulas, and have gradients without boxes too."""

import math

import pytest
import torch
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

import tolerances
from dense import naive_boxes
from widefield.dense import detection_losses

COUNT = 7.0
EPS = torch.finfo(torch.float32).eps


def _boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, dtype=torch.float64, generator=generator) * 10
    return torch.cat((corners, corners + 1 + torch.rand(count, 2, dtype=torch.float64, generator=generator) * 9), 1)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 1.5)])
def test_focal_loss(alpha, gamma):
    torch.manual_seed(0)
    logits = (torch.randn(40, 5, dtype=torch.float64) * 3).requires_grad_()
    labels = torch.randint(-1, 6, (40,))  # with ignored rows and background
    found = detection_losses.focal(logits, labels, COUNT, alpha=alpha, gamma=gamma)
    truth = torch.nn.functional.one_hot(labels.clamp(min=0), 6)[:, :5].double()
    used = labels >= 0
    expected = sigmoid_focal_loss(logits[used], truth[used], alpha, gamma, "sum") / (COUNT + EPS)
    tolerances.close(found, expected, tolerances.FLOAT64)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    tolerances.close(*grads, tolerances.FLOAT64)


def test_focal_loss_of_extreme_logits_is_finite():
    logits = torch.tensor([[300.0, -300.0]], requires_grad=True)
    for label, expected in ((0, 0.0), (1, 0.75 * 300 + 0.25 * 300), (2, 0.75 * 300)):
        loss = detection_losses.focal(logits, torch.tensor([label]), 1)
        assert loss.item() == pytest.approx(expected)
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_losses_of_differences():
    predicted, target = torch.tensor([[0.0, 2.0], [-0.5, 1.0]]), torch.tensor([[0.05, 0.0], [0.0, 1.0]])
    assert detection_losses.l1(predicted, target, COUNT).item() == pytest.approx(2.55 / COUNT)
    beta = 1 / 9
    smooth = 0.05**2 / 2 / beta + (2 - beta / 2) + (0.5 - beta / 2)
    assert detection_losses.smooth_l1(predicted, target, COUNT, beta=beta).item() == pytest.approx(smooth / COUNT)
    weights = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    assert detection_losses.l1(predicted, target, COUNT, weights).item() == pytest.approx(1.05 / COUNT)


def test_cross_entropies():
    logits = torch.tensor([0.0, 3.0, -2.0], dtype=torch.float64)
    expected = sum(math.log(1 + math.exp(x)) for x in (0.0, -3.0, -2.0))
    found = detection_losses.binary_cross_entropy(logits, torch.tensor([0, 1, 0]), COUNT)
    assert found.item() == pytest.approx(expected / (COUNT + EPS), rel=1e-12)
    rows = torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    expected = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))
    found = detection_losses.cross_entropy(rows, torch.tensor([1, 1]), COUNT)
    assert found.item() == pytest.approx(expected / (COUNT + EPS), rel=1e-12)


def test_losses_of_boxes():
    a, b = _boxes(30, 0), _boxes(30, 1)
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    giou = sum(1 - naive_boxes.overlap(x, y, "giou") for x, y in pairs) / (COUNT + EPS)
    assert detection_losses.giou_loss(a, b, COUNT).item() == pytest.approx(giou, rel=1e-12)
    # torchvision adds 1e-7 to other denominators than we do.
    stock = generalized_box_iou_loss(a, b, reduction="sum") / COUNT
    tolerances.close(detection_losses.giou_loss(a, b, COUNT), stock, tolerances.FLOAT32)
    iou = sum(-math.log(max(naive_boxes.overlap(x, y), 1e-6)) for x, y in pairs) / (COUNT + EPS)
    assert detection_losses.iou_loss(a, b, COUNT).item() == pytest.approx(iou, rel=1e-12)
    weights = torch.linspace(0, 1, 30, dtype=torch.float64)
    iou = sum(-w * math.log(max(naive_boxes.overlap(x, y), 1e-6)) for w, (x, y) in zip(weights, pairs, strict=True))
    assert detection_losses.iou_loss(a, b, COUNT, weights).item() == pytest.approx(float(iou) / (COUNT + EPS))


@pytest.mark.parametrize("name", ["l1", "smooth_l1", "iou_loss", "giou_loss"])
def test_no_boxes_have_a_loss_of_zero_with_a_gradient(name):
    predicted = torch.zeros(3, 4, requires_grad=True)
    loss = getattr(detection_losses, name)(predicted[:0], torch.zeros(0, 4), 1)
    loss.backward()
    assert loss.item() == 0
    assert predicted.grad is not None


@pytest.mark.parametrize("name", ["iou_loss", "giou_loss"])
def test_boxes_without_area_have_finite_losses_and_gradients(name):
    predicted = torch.tensor([[1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 2.0, 3.0]], requires_grad=True)
    loss = getattr(detection_losses, name)(predicted, torch.tensor([[0.0, 0.0, 2.0, 2.0]] * 2), 1)
    loss.backward()
    assert loss.isfinite()
    assert predicted.grad.isfinite().all()


def test_half_precision_is_summed_in_float32():
    wide = torch.full((1000, 100), 3.0, dtype=torch.float16)  # the sum exceeds float16
    assert detection_losses.l1(wide, torch.zeros(1000, 100), 1).item() == pytest.approx(3e5)
    assert detection_losses.focal(wide, torch.zeros(1000, dtype=torch.long), 1).isfinite()
