"""The rules of test time of pose models: flip test, reading, scores of poses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tolerances import FLOAT64
from widefield.data.crops import apply_matrix, crop_box, crop_matrix
from widefield.dense import HeatmapCodec, PoseRules

SKELETON = {"swapped": (0, 2, 1), "sigmas": (0.1, 0.1, 0.1)}


def rules(**changes: Any) -> PoseRules:
    return PoseRules(**{"crop_size": (32, 24), **SKELETON, **changes})


class Fixed(nn.Module):
    """Give a heatmap per channel: the image, sampled at every fourth pixel. Mirrored images give mirrored maps."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, ::4, ::4]


def test_the_flip_test_averages_mirrored_heatmaps_back_in_place() -> None:
    crops = torch.rand(2, 3, 32, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = rules(flip_test=False).heatmaps(Fixed(), crops)
    assert torch.equal(plain, crops[:, :, ::4, ::4])
    mirrored = crops.flip(3)[:, :, ::4, ::4].flip(3)[:, [0, 2, 1]]
    unshifted = rules(shift_heatmaps=False).heatmaps(Fixed(), crops)
    torch.testing.assert_close(unshifted, (plain + mirrored) / 2, rtol=FLOAT64, atol=0)
    shifted = torch.cat((mirrored[..., :1], mirrored[..., :-1]), 3)
    for kind, expected in (("msra", shifted), ("unbiased", shifted), ("udp", mirrored)):
        found = rules(kind=kind).heatmaps(Fixed(), crops)
        torch.testing.assert_close(found, (plain + expected) / 2, rtol=FLOAT64, atol=0)


@pytest.mark.parametrize("kind", ["msra", "unbiased", "udp"])
def test_heatmaps_of_any_size_are_read_in_pixels_of_the_crop(kind: str) -> None:
    points = torch.tensor([[[9.3, 14.8], [12.0, 20.5], [8.1, 11.9]]], dtype=torch.float64)
    for size in ((16, 12), (8, 6)):
        codec = HeatmapCodec((32, 24), size, 1.5, kind, 3)
        heatmaps, _ = codec.encode(points, torch.ones(1, 3))
        found = rules(kind=kind, sigma=1.5, blur=3).decode(heatmaps)
        within = 0.5 * 24 / size[1] if kind == "msra" else 0.1  # "msra" encodes whole pixels of the heatmap
        assert (found.points - points).abs().max() <= within


@pytest.mark.parametrize("kind", ["msra", "unbiased", "udp"])
def test_points_come_back_to_the_file(kind: str) -> None:
    points = torch.tensor([[[40.0, 71.0], [55.5, 60.0], [61.2, 90.3]]], dtype=torch.float64)
    center, scale = crop_box(torch.tensor([[30.0, 50.0, 75.0, 102.0]]), (32, 24))
    own = rules(kind=kind, sigma=1.5, blur=3)
    matrices = crop_matrix(center, scale, (32, 24), udp=own.aligned)
    codec = HeatmapCodec((32, 24), (16, 12), 1.5, kind, 3)
    heatmaps, _ = codec.encode(apply_matrix(points, matrices), torch.ones(1, 3))
    found = own.to_file(own.decode(heatmaps).points, matrices)
    pixel = float(scale[0, 0]) / 24
    assert (found - points).abs().max() <= (pixel if kind == "msra" else 0.1 * pixel)


def test_heatmaps_that_are_not_finite_are_refused() -> None:
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="heatmaps of Fixed are not finite"):
            rules().heatmaps(Fixed(), torch.full((1, 3, 32, 24), value))


def test_poses_are_scored_by_their_sure_key_points_and_their_box() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.2], [0.1, 0.0, -0.3], [0.3, 0.21, 0.1]], dtype=torch.float64)
    found = rules().pose_scores(scores, torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64))
    expected = torch.tensor([0.5 * (0.9 + 0.5) / 2, 0.0, (0.3 + 0.21) / 2], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=FLOAT64, atol=0)
    assert rules().pose_scores(scores[:0], torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "dark"}, "kind must be one of"),
        ({"swapped": (0, 2, 2)}, "swapped must hold every index of a key point once"),
        ({"sigmas": (0.1, 0.1)}, "sigmas must be 3 numbers above 0"),
        ({"sigmas": (0.1, 0.1, 0)}, "sigmas must be 3 numbers above 0"),
        ({"padding": 0}, "padding must be above 0"),
        ({"nms_threshold": 1.5}, "nms_threshold must be from 0.0 to 1.0"),
        ({"blur": 4}, "blur must be odd"),
        ({"crop_size": (32, 1)}, "a side of image_size"),
    ],
)
def test_rules_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rules(**changes)


def test_a_model_of_other_key_points_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must give 3 heatmaps.*Fixed gives \(1, 4, 8, 6\)"):
        rules().heatmaps(Fixed(), torch.zeros(1, 4, 32, 24))
