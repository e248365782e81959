"""The asymmetric loss against its formulas in float64, and where float32 reaches its ends."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tolerances import FLOAT64, close
from widefield.tasks.asymmetric_loss import asymmetric_loss

SETTINGS = [(0.0, 0.0, 0.0), (0.0, 4.0, 0.05), (1.0, 4.0, 0.05), (0.5, 0.5, 0.2), (2.0, 2.0, 0.0)]


def by_hand(logit: float, present: bool, gamma_pos: float, gamma_neg: float, margin: float) -> float:
    """Return the loss of one class as the paper writes it."""
    p = 1 / (1 + math.exp(-logit))
    if present:
        return -((1 - p) ** gamma_pos) * math.log(p)
    shifted = max(p - margin, 0)
    return -(shifted**gamma_neg) * math.log(1 - shifted)


@pytest.fixture
def logits() -> Tensor:
    return 4 * torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_is_the_papers(logits: Tensor, setting: tuple[float, float, float]) -> None:
    present = logits.roll(1, 0) > 1
    expected = [
        [by_hand(x, y, *setting) for x, y in zip(row, there, strict=True)]
        for row, there in zip(logits.tolist(), present.tolist(), strict=True)
    ]
    close(asymmetric_loss(logits, present, *setting), torch.tensor(expected, dtype=torch.float64), FLOAT64)
    away = logits.clone()
    # Away from the kink at the margin, where no derivative is.
    away[(away.sigmoid() - setting[2]).abs() < 1e-3] += 0.1
    assert torch.autograd.gradcheck(lambda x: asymmetric_loss(x, present, *setting), away.requires_grad_())


def test_without_exponents_and_margin_it_is_the_cross_entropy(logits: Tensor) -> None:
    present = logits > 0.5
    expected = F.binary_cross_entropy_with_logits(logits, present.double(), reduction="none")
    close(asymmetric_loss(logits, present, 0.0, 0.0, 0.0), expected, FLOAT64)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients_are_finite_for_logits_of_any_size(
    setting: tuple[float, float, float], dtype: torch.dtype
) -> None:
    logits = torch.tensor([-1e4, -200.0, -20.0, -3.0, 0.0, 3.0, 20.0, 200.0, 1e4], dtype=dtype).requires_grad_()
    for present in (True, False):
        loss = asymmetric_loss(logits[None], torch.full((1, 9), present), *setting)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all()
        assert (loss >= 0).all()
        assert gradient.isfinite().all()


def test_absent_classes_below_the_margin_are_free() -> None:
    logits = torch.tensor([[-4.0, -2.9, 0.0]]).requires_grad_()
    loss = asymmetric_loss(logits, torch.zeros(1, 3), 0.0, 4.0, 0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss[0, :2].tolist() == [0, 0]
    assert gradient[0, :2].tolist() == [0, 0]
    assert loss[0, 2] > 0
