"""Every detector learns eight fixed images by heart: losses, targets and detections fit each other.

Steps to an AP above 0.95, from random weights: 200 for FCOS, 300 for the others. They reach 0.98 and more.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from widefield.data import Scenes
from widefield.tasks import Detection

BOXES: dict[str, Any] = {
    "neck_channels": 32, "box_channels": 128, "rois_per_image": 64, "anchor_scales": (4.0,), "train_proposals": 100,
    "test_proposals": 100,
}  # fmt: skip
CASES: dict[str, tuple[int, float, dict[str, Any]]] = {
    "fcos": (200, 5e-3, {"neck_channels": 64, "num_convs": 1, "ranges": (32, 64)}),
    "retinanet": (300, 2e-3, {"neck_channels": 32, "num_convs": 1}),
    "faster_rcnn": (300, 2e-3, BOXES),
    "mask_rcnn": (300, 2e-3, BOXES),
    "cascade_rcnn": (300, 2e-3, BOXES),
}
"""Model -> steps, peak learning rate, arguments."""
NETWORK: dict[str, Any] = {
    "stem_type": "overlap_act", "depths": [1, 1, 1, 1], "dims": [16, 32, 64, 64], "ls_init_value": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name == "fcos" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_eight_images_are_learned_by_heart(name: str) -> None:
    steps, rate, head_args = CASES[name]
    torch.manual_seed(0)
    scenes = Scenes("train", size=64, count=8, objects=(1, 3), object_sizes=(20, 48), hflip=0.0)
    task = Detection(Scenes.object_classes, model=name, head_args=head_args)
    model = task.model(timm.create_model("convnext_tiny", features_only=True, **NETWORK)).train()
    batch = task.collate([scenes[index] for index in range(8)])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.15, div_factor=10, final_div_factor=100
    )
    for _ in range(steps):
        task.loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    metrics = task.metrics()
    with torch.no_grad():
        metrics.update(**task.outputs(model.eval(), batch))
    found = metrics.compute()
    assert found["box_ap"] > 0.95
    if task.masks:
        assert found["mask_ap"] > 0.95
