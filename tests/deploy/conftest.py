"""Networks for several export tests."""

import pytest
from torch import nn


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        return {"map": y, "mean": y.mean((2, 3))}


@pytest.fixture
def two_outputs():
    return TwoOutputs().eval()
