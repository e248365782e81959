"""Training on the published layouts of segmentation sets, on made data, with exact resume."""

import signal
from dataclasses import replace

import pytest

from data.made_segmentation import write_ade20k, write_cityscapes, write_coco_stuff, write_masks, write_voc
from train.helpers import QUIET, log, same_weights
from widefield.loading import load_trained
from widefield.tasks import Segmentation
from widefield.train import DataSpec, ModelSpec, OptimizerSpec, Recipe, TaskSpec, train

LAYOUTS = {
    "ade20k": (write_ade20k, {}),
    "cityscapes": (write_cityscapes, {}),
    "voc": (write_voc, {}),
    "coco_stuff": (write_coco_stuff, {}),
    "masks": (write_masks, {"classes": ["sky", "sea", "ship"]}),
}


def recipe(name, root, output, **changes):
    args = {"root": str(root), "size": 32, "scale": [64, 48], **LAYOUTS[name][1], **changes.pop("args", {})}
    return Recipe(
        name=name,
        output=str(output),
        data=DataSpec(name, args),
        model=ModelSpec("test_convnext.r160_in1k", {}),
        task=TaskSpec("segmentation", {"head_args": {"channels": 8}}),
        optimizer=OptimizerSpec("adamw", lr=1e-3),
        batch_size=2,
        **{"max_steps": 4, "evaluate_every": 2, "workers": 0, **changes},
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_trains_and_is_evaluated_at_the_size_of_its_files(name, tmp_path):
    LAYOUTS[name][0](tmp_path / "data")
    result = train(recipe(name, tmp_path / "data", tmp_path), console=QUIET)
    assert 0 <= result.metrics["miou"] <= 1
    assert result.metrics["loss"] > 0
    load_trained(tmp_path / name)


def test_augmentation_of_files_resumes_exactly_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    write_masks(tmp_path / "data", counts={"train": 8, "val": 2})
    whole = train(recipe("masks", tmp_path / "data", tmp_path / "whole", max_steps=6), console=QUIET)
    loss, calls = Segmentation.loss, iter(range(1, 100))

    def interrupting(*args):
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return loss(*args)

    monkeypatch.setattr(Segmentation, "loss", interrupting)
    begun = recipe("masks", tmp_path / "data", tmp_path / "part", max_steps=6)
    part = train(begun, console=QUIET)
    assert (part.steps, part.interrupted) == (3, signal.SIGINT)
    rest = train(replace(begun, workers=1), resume=part.folder, console=QUIET)
    assert log(rest.folder) == log(whole.folder)
    assert same_weights(rest.model, whole.model)
