"""Runs with gradient checkpointing: the same weights and statistics, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from train.helpers import same_weights
from widefield.train import ConversionSpec, DataSpec, ModelSpec, RunResult, TaskSpec

Run = Callable[..., RunResult]


def test_gradient_checkpointing_changes_no_number(run: Run) -> None:
    plain = {"model": ModelSpec("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}), "epochs": 1}
    whole, again = run(name="whole", **plain), run(name="again", gradient_checkpointing=True, **plain)
    assert same_weights(whole.model, again.model)


@pytest.mark.parametrize(
    ("backbone", "parts"),
    [
        (ModelSpec("hornet_tiny_7x7", {"depths": [1, 1, 1, 1], "widths": [16, 16, 32, 32]}), ["model"]),
        (
            ModelSpec("morf_resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}),
            [f"layer{i}" for i in range(1, 5)],
        ),
    ],
    ids=lambda case: case.name if isinstance(case, ModelSpec) else "",
)
def test_gradient_checkpointing_of_trunks_in_segmenters(run: Run, backbone: ModelSpec, parts: list[str]) -> None:
    plain = {
        "model": backbone,
        "data": DataSpec("scenes", {"count": 4, "size": 32}),
        "task": TaskSpec("segmentation", {"head_args": {"channels": 8, "auxiliary_channels": 8}}),
        "batch_size": 2,
        "epochs": 1,
    }
    whole, again = run(name="whole", **plain), run(name="again", gradient_checkpointing=True, **plain)
    enabled = [name for name, module in again.model.named_modules() if getattr(module, "grad_checkpointing", False)]
    assert [name.rpartition(".")[2] for name in enabled] == parts
    assert same_weights(whole.model, again.model)


def test_gradient_checkpointing_leaves_statistics_of_timms_norms_alone(run: Run) -> None:
    plain: dict[str, Any] = {"model": ModelSpec("test_resnet"), "epochs": 1, "batch_size": 8}
    plain["conversion"] = ConversionSpec("morf", "layer*.conv2", {"kernel_sizes": [3, 5]})
    whole, again = run(name="whole", **plain), run(name="again", gradient_checkpointing=True, **plain)
    assert same_weights(whole.model, again.model)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (ModelSpec("test_efficientnet", {"feature_cls": "hook"}), "the feature maps of FeatureHookNet come from hooks"),
        (ModelSpec("dla46x_c"), "DLA does not offer it"),
    ],
)
def test_backbones_that_cannot_recompute_are_refused(run: Run, backbone: ModelSpec, message: str) -> None:
    head = (
        {}
        if backbone.name.startswith("dla")
        else {
            "data": DataSpec("scenes", {"count": 2, "size": 32}),
            "task": TaskSpec("segmentation", {"head_args": {"channels": 8, "auxiliary_channels": 8}}),
        }
    )
    with pytest.raises(ValueError, match=f"gradient_checkpointing: {message}"):
        run(model=backbone, gradient_checkpointing=True, **head)
