"""Run the parts of a detector whose multiply-accumulates published counts add up."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from widefield.dense.detector import Detector

BOX_ROIS, MASK_ROIS = 1000, 100
"""RoIs in each box head and in each mask head, as in MMDetection's count of FLOPs."""


class FixedRoIs(nn.Module):
    """A detector without its search for objects: heads run on a fixed number of RoIs.

    The work of a forward pass then depends on the size of the images only, and it runs on the meta device, too::

        cost = widefield.bench.cost(FixedRoIs(model), torch.empty(1, 3, 800, 1280, device="meta"))

    Args:
        detector: a detector; its parameters are shared.
        box_rois, mask_rois: RoIs in each box head and in each mask head of a two-stage detector.
    """

    def __init__(self, detector: Detector, box_rois: int = BOX_ROIS, mask_rois: int = MASK_ROIS) -> None:
        super().__init__()
        self.detector = detector
        self.box_rois, self.mask_rois = box_rois, mask_rois

    def forward(self, images: Tensor) -> list[Any]:
        """Images (N, C, H, W) -> the outputs of all heads."""
        detector: Any = self.detector
        maps = self.detector.maps(images)
        if "roi_head" not in detector._modules:
            return [detector.bbox_head(maps)]
        outputs: list[Any] = [detector.rpn_head(maps)]
        for name, count in (("bbox_head", self.box_rois), ("mask_head", self.mask_rois)):
            found: Any = detector.roi_head._modules.get(name, [])  # one head, one for each stage, or none
            for head in [found] if hasattr(found, "roi_size") else found:
                outputs.append(head(maps[0].new_zeros(count, maps[0].shape[1], head.roi_size, head.roi_size)))
        return outputs
