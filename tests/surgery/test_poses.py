"""Comparison of pose models by the key points that they read from their heatmaps."""

import pytest
import torch
from torch import nn

from tolerances import FLOAT64, close
from widefield import dense
from widefield.surgery import compare
from widefield.surgery.compare import Tally
from widefield.surgery.inputs import batches

POINTS = torch.tensor([[[40.0, 20.0], [13.0, 50.0], [60.0, 77.0]], [[30.0, 30.0], [8.0, 9.0], [66.0, 12.0]]])
SIZE = (96, 96)


class Still(nn.Module):
    """A pose model that sees the key points it was given."""

    num_keypoints = 3
    stride = 4.0

    def __init__(self, points, kind="unbiased"):
        super().__init__()
        self.points, self.kind = nn.Parameter(points.double()), kind

    def decode(self, heatmaps, image_size=None):
        size = image_size or tuple(4 * side for side in heatmaps.shape[2:])
        return dense.HeatmapCodec(tuple(size), tuple(heatmaps.shape[2:]), kind=self.kind, blur=5).decode(heatmaps)

    def forward(self, images):
        size = tuple(images.shape[2:])
        codec = dense.HeatmapCodec(size, tuple(side // 4 for side in size), kind=self.kind, blur=5)
        points = self.points[: len(images)]
        return codec.encode(points.detach(), torch.ones(points.shape[:2]))[0]


def moved(steps):
    """Return the points with each moved to the right by its step."""
    return POINTS + torch.tensor(steps)[..., None] * torch.tensor([1.0, 0.0])


@pytest.mark.parametrize("decoded", [False, True], ids=["heatmaps", "key points"])
def test_key_points_are_compared_in_pixels(decoded):
    first, second = Still(POINTS), Still(moved([[0.0, 0.5, 2.0], [0.0, 0.0, -12.0]]))
    answer = (lambda x: second.decode(second(x))) if decoded else second
    apart = compare(first, answer, torch.zeros(2, 3, *SIZE))
    assert (apart.images, apart.keypoints) == (2, 6)
    assert apart.agreement == 4 / 6
    assert apart.near == 5 / 6  # 5 % of 96 pixels are 4.8
    assert apart.distance == pytest.approx(12.0, abs=0.1)
    assert not apart.within(1.0)
    assert (
        apart.agreed
        == "66.67% of 6 key points within a pixel and 83.33% within 5 % of the image (largest distance 12 pixels)"
    )
    if decoded:
        assert apart.scale == 1.0
        assert apart.max_abs < 0.1


def test_labels_give_pck():
    first, second = Still(POINTS), Still(moved([[0.0, 0.5, 2.0], [0.0, 0.0, -12.0]]))
    labels = torch.cat((POINTS, torch.tensor([[2.0, 1.0, 1.0], [1.0, 0.0, 2.0]])[..., None]), 2)
    batch = {"image": torch.zeros(2, 3, *SIZE), "label": torch.zeros(2, dtype=torch.long), "keypoints": labels}
    apart = compare(first, second, [batch])
    assert apart.score == "PCK"
    assert apart.scores == (1.0, 4 / 5)
    assert "PCK 100.00% -> 80.00%" in str(apart)
    with pytest.raises(ValueError, match="key points must be"):
        compare(first, second, [{**batch, "keypoints": labels[:, :2]}])


def test_key_points_of_objects_are_not_labels_of_poses():
    batch = {"image": torch.zeros(1, 3, 8, 8), "keypoints": [torch.zeros(4, 5, 3)], "label": torch.tensor([3])}
    assert [labels.tolist() for _, labels in batches([batch], nn.Identity())] == [[3]]


def test_peaks_of_equal_height_are_tied():
    heatmaps = torch.zeros(1, 3, 24, 24)
    heatmaps[:, :, 5, 7] = 1.0
    heatmaps[:, :, 20, 3] = 0.9999
    other = heatmaps.clone()
    other[:, :2, 20, 3] = 1.0001
    tally = Tally(Still(POINTS, "msra"))
    tally.add(heatmaps, other)
    apart = tally.difference()
    assert (apart.agreement, apart.tied, apart.distance) == (1 / 3, 2, 0.0)
    assert not apart.within(1e-3)  # only if most others agree
    tally = Tally(Still(POINTS, "msra"))
    other[:, 1, 20, 3] = 0.9999
    tally.add(heatmaps, other)
    assert tally.difference().within(1e-3)


def test_a_shift_by_one_pixel_of_the_heatmap_is_not_a_tie():
    model = Still(POINTS, "msra")
    heatmaps = model(torch.zeros(2, 3, *SIZE))
    found = model.decode(heatmaps)
    tally = Tally(model)
    tally.add(heatmaps, (found.points + 4, found.scores), size=SIZE)
    apart = tally.difference()
    assert (apart.agreement, apart.tied) == (0.0, 0)
    assert apart.distance == pytest.approx(4 * 2**0.5)


def test_other_outputs_are_refused():
    model = Still(POINTS)
    heatmaps = model(torch.zeros(2, 3, *SIZE))
    with pytest.raises(ValueError, match="neither such heatmaps nor"):
        compare(model, lambda x: heatmaps[:, :2], torch.zeros(2, 3, *SIZE))
    with pytest.raises(ValueError, match="not finite"):
        Tally(model).add(heatmaps * torch.nan, heatmaps)
    tally = Tally(model)
    tally.add(heatmaps, heatmaps * torch.nan)
    assert not tally.difference().within(1e9)


def test_key_points_that_are_not_numbers_are_far_away():
    model = Still(POINTS)
    heatmaps = model(torch.zeros(2, 3, *SIZE))
    found = model.decode(heatmaps)
    tally = Tally(model)
    tally.add(heatmaps, (found.points * torch.nan, found.scores))
    apart = tally.difference()
    assert (apart.agreement, apart.near, apart.distance) == (0.0, 0.0, torch.inf)


def test_heatmaps_of_parts_are_tensors():
    tally = Tally()
    tally.add(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4))
    apart = tally.difference()
    assert (apart.keypoints, apart.relative) == (None, 0.0)
    close(torch.tensor(apart.rms), torch.tensor(0.0), FLOAT64)
