"""The inputs that verify trim: loaders with one or several sizes, and generated examples."""

import logging

import pytest
import torch
from torch import nn

from widefield.surgery.trim import trim

MODEL = {"kernel_size": 11, "padding": 5}


def conv(**options):
    return nn.Sequential(nn.Conv2d(3, 4, **(MODEL | options))).eval()


def test_every_batch_must_have_the_size_of_the_example():
    loader = [torch.randn(2, 3, 5, 5), torch.randn(2, 3, 9, 9)]
    with pytest.raises(ValueError, match=r"images have size \(3, 9, 9\), but example_input has \(3, 5, 5\)"):
        trim(conv(), 0.01, loader=loader, example_input=5)
    trim(conv(), 0.01, loader=loader)
    trim(conv(), 0.01, loader=loader[:1] * 2, example_input=5)


class Enlarging(nn.Module):
    """Enlarges bright images, so that its kernel meets a larger map."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, **MODEL)

    def forward(self, x):
        if x.amax() > 9:
            x = nn.functional.interpolate(x, scale_factor=3)
        return self.conv(x).mean((2, 3))


def test_a_start_beyond_the_tolerance_is_an_error():
    loader = [torch.rand(2, 3, 5, 5), 10 * torch.rand(2, 3, 5, 5) + 1]
    with pytest.raises(RuntimeError, match=r"changes the outputs by .* more than tolerance=0.001"):
        trim(Enlarging().eval(), 0.001, loader=loader, example_input=5)
    reports = []
    trim(Enlarging().eval(), 0.001, loader=loader, example_input=5, limit=3, report=reports.append)  # overrides it
    assert reports[0].change.rms > 0.001
    trim(conv(), 0.0, loader=[torch.randn(2, 3, 5, 5)], example_input=5)  # rounding errors are ignored


class Reads(nn.Module):
    """Reads the weight of its convolution, with padding of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 7, padding=3)

    def forward(self, x):
        return nn.functional.conv2d(x, self.conv.weight, None, padding=3)


class Picky(nn.Module):
    """Accepts images of one size only."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 2, 7, padding=3), nn.Linear(2 * 49, 3)

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


def test_without_data_the_model_is_tried_on_an_example(caplog):
    with pytest.raises(RuntimeError, match="reads a convolution's kernel size or padding by itself"):
        trim(Reads().eval(), 0.8)
    reports = []
    with caplog.at_level(logging.WARNING):
        trim(conv(), 0.8, report=reports.append)
    assert reports[0].verified is not None
    assert reports[0].macs_before is None
    assert not caplog.records
    trim(Picky().eval(), 0.3, report=reports.append)
    assert reports[1].verified is None
    assert "the trimmed model is not verified, as it does not run on noise" in caplog.text


class Diverges(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 7, padding=3)

    def forward(self, x):
        return self.conv(x) / 0


def test_outputs_that_cannot_be_compared_are_named(caplog):
    for options in ({"example_input": 9}, {"loader": [torch.randn(1, 3, 9, 9)]}):
        with pytest.raises(ValueError, match=r"cannot be verified: .* outputs are not finite"):
            trim(Diverges().eval(), 0.8, **options)
    trim(Diverges().eval(), 0.8)  # the guarantee is per layer
    assert "not verified" in caplog.text


class Exhausted:
    """An iterable that is exhausted after one pass."""

    def __init__(self, images):
        self.images = iter(images)

    def __iter__(self):
        return self.images


def test_loaders_that_run_out_are_told_so():
    with pytest.raises(ValueError, match="if it gave images in the first pass, it ran out"):
        trim(conv(), 0.3, loader=Exhausted([torch.randn(2, 3, 9, 9)]))


def test_same_padding_gives_up_as_many_taps_as_wanted_dilated_too():
    conv = torch.nn.Conv2d(2, 2, 7, padding="same", dilation=3).eval()
    with torch.no_grad():
        conv.weight[:, :, :3] = conv.weight[:, :, 4:] = 0
        conv.weight[..., :3] = conv.weight[..., 4:] = 0  # except for the center
    assert trim(conv, 0.0).kernel_size == (1, 1)
