"""A pose model learns eight fixed crops by heart: targets, decoding and the way back to the file fit each other."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from widefield.data import ScenePoses
from widefield.tasks import PoseEstimation

NETWORK: dict[str, Any] = {
    "stem_type": "overlap_act", "depths": [1, 1, 1, 1], "dims": [16, 32, 64, 64], "ls_init_value": None,
}  # fmt: skip
STEPS = 150


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least"), [("msra", 0.85), ("unbiased", 0.95), ("udp", 0.98)])
def test_eight_crops_are_learned_by_heart(kind: str, least: float) -> None:
    torch.manual_seed(0)
    udp = kind == "udp"
    scenes = ScenePoses("val", size=64, crop_size=64, count=8, objects=(1, 1), object_sizes=(24, 48), udp=udp)
    task = PoseEstimation.for_data(scenes, channels=[32, 32, 32], kind=kind, sigma=1.5, blur=7)
    model = task.model(timm.create_model("convnext_tiny", features_only=True, **NETWORK)).train()
    batch = task.collate([scenes[index] for index in range(8)])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.15)
    mirrored = {**batch, "image": batch["image"].flip(3), "keypoints": flipped(batch["keypoints"])}
    for _ in range(STEPS):
        (task.loss(model, batch) + task.loss(model, mirrored)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    metrics = task.metrics()
    with torch.no_grad():
        outputs = task.outputs(model.eval(), batch)
    metrics.update(**outputs)
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found["pck20"] == 1.0, found
    assert task.rate(outputs).mean() > least, found


def flipped(keypoints: torch.Tensor) -> torch.Tensor:
    """Return the key points of mirrored crops of 64 pixels."""
    swapped = keypoints[:, [0, 1, 4, 3, 2]]
    return torch.cat([63 - swapped[..., :1], swapped[..., 1:]], 2)
