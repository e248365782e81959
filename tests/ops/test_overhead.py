"""Python calls in a forward pass or a training step of our layers, including calls inside PyTorch."""

import sys

import pytest
import torch

from widefield.nn import DepthwiseConv2d, MoRFConv2d


def calls(run):
    """Return the number of Python function calls in ``run``."""
    count = 0

    def watch(frame, event, _):
        nonlocal count
        count += event == "call"

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


# A plain torch.nn.Conv2d makes 7 calls. Before choices were cached, these made 13, 67, 148, 74, 295, 379, 323 and
# 147 calls (PyTorch 2.14).
CASES = {
    "depthwise": (lambda: DepthwiseConv2d(64, 64, 7, padding=3), "serve", 17),
    "depthwise, training": (lambda: DepthwiseConv2d(64, 64, 7, padding=3), "forward", 31),
    "depthwise, step": (lambda: DepthwiseConv2d(64, 64, 7, padding=3), "step", 80),
    "depthwise 31x31": (lambda: DepthwiseConv2d(64, 64, 31, padding=15), "serve", 38),
    "mixture": (lambda: MoRFConv2d(64, 64, groups=64), "serve", 125),
    "mixture, step": (lambda: MoRFConv2d(64, 64, groups=64), "step", 175),
    "hard mixture": (lambda: MoRFConv2d(64, 64, groups=64, routing="hard"), "serve", 175),
    "fused mixture": (lambda: MoRFConv2d(64, 64, groups=64).eval().fuse(), "serve", 82),
}


@pytest.mark.parametrize("name", CASES)
def test_calls_in_python(name):
    make, mode, most = CASES[name]
    layer, x = make().train(mode != "serve"), torch.randn(2, 64, 14, 14)
    layer.train(mode != "serve")

    def run():
        with torch.set_grad_enabled(mode != "serve"):
            y = layer(x)
            if mode == "step":
                y.sum().backward()

    first = calls(run)
    counted = calls(run)
    assert counted <= most, counted
    assert counted <= first


@pytest.mark.parametrize("layer", [DepthwiseConv2d(64, 64, 7, padding=3), MoRFConv2d(64, 64, groups=64)], ids=repr)
def test_remembered_decisions_do_not_skip_checks(layer):
    layer(torch.randn(2, 64, 14, 14))
    for wrong in (torch.randn(2, 63, 14, 14), torch.randn(64, 14), torch.randn(2, 64, 14, 14).double()):
        with pytest.raises((ValueError, TypeError)):
            layer(wrong)
