"""Settings of detectors for small images with small objects: finer levels and smaller anchors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from widefield.dense import FCOS, CascadeRCNN, Detector, FasterRCNN, Targets

NETWORK: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
SMALL: dict[str, Any] = {"neck_channels": 16, "box_channels": 32, "rois_per_image": 32, "anchor_scales": (2.0,)}


def losses(model: Detector) -> dict[str, torch.Tensor]:
    """Return the losses on an object of 7 x 9 pixels, after checking that every parameter gets a gradient."""
    target = Targets(torch.tensor([[10.0, 12, 17, 21]]), torch.tensor([1]))
    found: dict[str, torch.Tensor] = model.train()(torch.randn(1, 3, 64, 64), [target])
    torch.stack(list(found.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return found


def test_the_finest_level_of_fcos_can_have_stride_4() -> None:
    torch.manual_seed(0)
    options = {"neck_channels": 64, "num_convs": 1, **NETWORK}
    fine = FCOS("convnext_atto", 3, start_level=0, ranges=(16, 32, 64), **options)
    assert fine.bbox_head.strides == (4, 8, 16, 32)
    assert losses(fine)["loss_bbox"] > 0
    usual = FCOS("convnext_atto", 3, **options)
    assert usual.bbox_head.strides == (8, 16, 32, 64, 128)
    finer = fine.bbox_head.targets([torch.zeros(16 // 2**i, 16 // 2**i) for i in range(4)],
                                   torch.tensor([[10.0, 12, 17, 21]]), torch.tensor([1]))  # fmt: skip
    assert (finer.labels[:256] == 1).sum() == 2  # the points (14, 14) and (14, 18)


@pytest.mark.parametrize("kind", [FasterRCNN, CascadeRCNN])
def test_anchors_can_be_small(kind: type[FasterRCNN] | type[CascadeRCNN]) -> None:
    torch.manual_seed(0)
    model = kind("convnext_atto", 3, **SMALL, **NETWORK)
    sides = [model.rpn_head.anchors.shapes(level)[1][2] * 2 for level in range(5)]
    assert sides == [8, 16, 32, 64, 128]
    assert losses(model)["loss_rpn_bbox"] > 0
