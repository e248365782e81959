"""Masked pre-training in two processes: validation masks, nearest neighbors, refusals and synchronized norms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tolerances import NETWORK, close
from train.helpers import QUIET, log
from train.test_masked_runs import recipe
from train.test_processes import launch
from widefield import data, masking
from widefield.loading.inputs import Selection
from widefield.masking.visibility import Treated
from widefield.tasks import MaskedImage
from widefield.train import ModelSpec, OptimizerSpec, TaskSpec, train
from widefield.train.evaluation import Share
from widefield.train.loaders import batches, val_loader
from widefield.train.sync_norm import synchronized

SMALL = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}


def test_shards_have_the_masks_of_the_whole_set() -> None:
    whole = Selection(data.create("digits", "val", size=32), 9)
    task = MaskedImage.for_data(whole, patch=8, out_indices=[1])
    torch.manual_seed(0)
    model = masking.MaskedAutoencoder("resnet18", task.method, out_indices=[1], **SMALL).eval()

    def losses(dataset: data.SampleSet) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for batch in batches(val_loader(dataset, task.collate, 4, 0)):
                found |= dict(zip(batch["index"].tolist(), task.outputs(model, batch)["value"], strict=True))
        return found

    alone = losses(whole)
    shards = losses(Share(whole, 0, 2)) | losses(Share(whole, 1, 2))
    assert shards.keys() == alone.keys() == set(range(len(whole)))
    for place, value in alone.items():
        close(shards[place], value, NETWORK)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    still = OptimizerSpec("sgd", lr=0.0, weight_decay=0.0)  # training masks are drawn in each process
    one = recipe(tmp_path / "one", optimizer=still, ema=None, max_steps=1, evaluate_every=1)
    two = replace(one, output=str(tmp_path / "two"), batch_size=16)
    launch(two, tmp_path / "two.yaml", 2)
    ours, theirs = (log(folder)[-1] for folder in (train(one, console=QUIET).folder, two.folder))
    for name in ("loss", "knn_top1"):
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5), name


@pytest.mark.slow
def test_every_process_stops_if_the_first_finds_a_leak(tmp_path: Path) -> None:
    leaky = recipe(
        tmp_path, model=ModelSpec("mobilevitv2_050"), task=TaskSpec("masked_image", {"patch": 32}), batch_size=8
    )
    with pytest.raises(AssertionError, match="does not fit the task"):
        launch(leaky, tmp_path / "leaky.yaml", 2)


def test_synchronized_norms_keep_their_rules() -> None:
    model = masking.MaskedAutoencoder("resnet18", "fcmae", **SMALL)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    converted = synchronized(model, torch.device("cuda"))
    for name in names:
        module = converted.get_submodule(name)
        assert isinstance(module, nn.SyncBatchNorm), name
        rule = vars(module).get("forward")
        if name.startswith("encoder."):
            assert isinstance(rule, Treated)
            assert rule.module is module
            assert rule.visibility is model.visibility
