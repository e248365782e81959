"""The recipes that train small detectors on `scenes`: what they build, and a few of their steps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from train.helpers import QUIET, log
from widefield import dense
from widefield.train import Recipe, load_recipe, train

MODELS = {
    "demo_scenes_faster_rcnn": dense.FasterRCNN,
    "demo_scenes_mask_rcnn": dense.MaskRCNN,
    "demo_scenes_fcos": dense.FCOS,
}

SLOW = pytest.param("demo_scenes_mask_rcnn", marks=pytest.mark.slow)


def shortened(name: str, output: Path) -> Recipe:
    """Return a recipe with four steps on ten small scenes."""
    recipe = load_recipe(name)
    return replace(
        recipe,
        output=str(output),
        data=replace(recipe.data, args={"size": 64, "count": 10}),
        schedule=replace(recipe.schedule, warmup_steps=2),
        max_steps=4,
        evaluate_every=4,
        batch_size=2,
        log_every=1,
        trackers=[],
    )


@pytest.mark.parametrize("name", [SLOW if name == "demo_scenes_mask_rcnn" else name for name in MODELS])
def test_the_recipe_trains_its_detector(name: str, tmp_path: Path) -> None:
    result = train(shortened(name, tmp_path), console=QUIET)
    assert type(result.model) is MODELS[name]
    assert ("mask_ap" in result.metrics) == (name == "demo_scenes_mask_rcnn")
    losses = [entry["loss"] for entry in log(result.folder) if entry["kind"] == "step"]
    assert all(map(math.isfinite, losses))
    strides = result.model.bbox_head.strides if name == "demo_scenes_fcos" else result.model.rpn_head.anchors.strides
    assert strides[0] == 4
    if name != "demo_scenes_fcos":
        assert [result.model.rpn_head.anchors.shapes(level)[1][2] * 2 for level in (0, 4)] == [8, 128]
