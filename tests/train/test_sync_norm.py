"""Synchronized batch norm on the CPU, in a group of one process, against PyTorch's batch norm.

``test_processes.py`` trains with it in two processes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

from tolerances import BFLOAT16, FLOAT64, close
from widefield.train.sync_norm import synchronized


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, eps=1e-3, momentum=None),
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        BatchNormAct2d(3),
    ],
    ids=["plain", "cumulative", "no affine", "no statistics", "timm's with ReLU"],
)
def test_outputs_gradients_and_statistics(norm: nn.Module) -> None:
    torch.manual_seed(0)
    norm = norm.double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    ours = synchronized(copy.deepcopy(norm), torch.device("cpu"))
    assert ours.state_dict().keys() == norm.state_dict().keys()
    for _ in range(3):
        x = torch.randn(4, 3, 5, 6, dtype=torch.float64, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        weight = torch.randn(4, 3, 5, 6, dtype=torch.float64)
        (norm(x) * weight).sum().backward()
        (ours(y) * weight).sum().backward()
        assert x.grad is not None
        assert y.grad is not None
        close(y.grad, x.grad, FLOAT64)
        for mine, theirs in zip(ours.parameters(), norm.parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            close(mine.grad, theirs.grad, FLOAT64)
    for name, value in norm.state_dict().items():
        close(ours.state_dict()[name], value, FLOAT64)
    close(ours.eval()(x), norm.eval()(x), FLOAT64)


def test_half_precision_is_computed_in_float32() -> None:
    x = 100 + torch.randn(8, 3, 16, 16)
    expected = nn.BatchNorm2d(3)(x.bfloat16().float())
    found = synchronized(nn.BatchNorm2d(3), torch.device("cpu"))(x.bfloat16())
    assert found.dtype == torch.bfloat16
    close(found, expected, BFLOAT16)
