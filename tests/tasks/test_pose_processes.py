"""Poses in two processes: gradients add up to those of one process, and metrics are the same numbers."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import distributed, multiprocessing

from tolerances import FLOAT64, close
from widefield.data import Sample, ScenePoses
from widefield.dense import HeatmapPose
from widefield.tasks import PoseEstimation


def parts() -> tuple[PoseEstimation, HeatmapPose, list[Sample]]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    scenes = ScenePoses("val", size=64, crop_size=(32, 32), count=4)
    task = PoseEstimation.for_data(scenes, channels=[], sigma=1.0, nms_threshold=0.5)
    network = timm.create_model("convnext_atto", features_only=True, depths=[1] * 4, dims=[8] * 4, out_indices=(1,))
    model = task.model(network).double()
    assert isinstance(model, HeatmapPose)
    with torch.no_grad():
        model.head.final_layer.weight.mul_(1000)  # heatmaps that differ
    samples = [{**scenes[index], "image": scenes[index]["image"].double()} for index in range(25)]
    return task, model, samples


def gradients(task: PoseEstimation, model: HeatmapPose, samples: list[Sample]) -> dict[str, torch.Tensor]:
    task.loss(model, task.collate(samples)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def measured(task: PoseEstimation, model: HeatmapPose, samples: list[Sample], size: int, *, gather: bool) -> dict:
    """Return all results, from batches of some samples."""
    metrics = task.metrics()
    with torch.no_grad():
        for start in range(0, len(samples), size):
            batch = task.collate(samples[start : start + size])
            index = torch.arange(start, start + len(batch["image"]))
            metrics.update(**task.outputs(model.eval(), {**batch, "index": index}))
    if gather:
        metrics["pose"].sync()
    return task.scores(metrics).to_dict()


def work(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    task, model, samples = parts()
    found = gradients(task, model, samples[rank:8:2])
    for grad in found.values():
        distributed.all_reduce(grad)
    scores = measured(task, model, samples[rank::2], 3 + rank, gather=True)
    torch.save(({name: grad / 2 for name, grad in found.items()}, scores), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path) -> None:
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    (found, scores), (_, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    task, model, samples = parts()
    for name, grad in gradients(task, model, samples[:8]).items():
        close(found[name], grad, FLOAT64)
    expected = measured(task, model, samples, 25, gather=False)
    assert scores == others == expected
    assert expected["metrics"]["epe"] > 0
    assert sum(expected["people"]) >= 25
