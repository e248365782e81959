"""Losses of two-stage detectors in two processes: their gradients add up to those of one process."""

import pytest
import torch
from torch import distributed, multiprocessing

from tolerances import DENOMINATORS, close
from widefield import dense
from widefield.dense.boxes import Sampler

COUNTS = (1, 4)
"""Objects of the two images, so that the processes have different numbers of everything."""


def model():
    torch.manual_seed(0)
    made = dense.MaskRCNN("test_resnet", 3, neck_channels=16, box_channels=16, norm_eval=True).double().train()
    made.rpn_head.sampler = made.roi_head.sampler = Sampler(10**6, 1 - 1e-6)  # takes all: nothing is drawn
    return made


def batch():
    torch.manual_seed(1)
    images, targets = torch.randn(2, 3, 64, 96).double(), []
    for count in COUNTS:
        corners = 30 * torch.rand(count, 2)
        boxes = torch.cat([corners, corners + 12 + 15 * torch.rand(count, 2)], 1).double()
        masks = torch.rand(count, 64, 96) < 0.5
        targets.append(dense.Targets(boxes, torch.arange(count) % 3, masks))
    return images, targets


def gradients(images, targets):
    made = model()
    losses = made(images, targets)
    torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
    return {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def train(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images, targets = batch()
    found = gradients(images[rank : rank + 1], targets[rank : rank + 1])
    for grad in found.values():
        distributed.all_reduce(grad)
    if rank == 0:
        torch.save({name: grad / 2 for name, grad in found.items()}, f"{folder}/gradients.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_the_gradients_of_two_processes_are_those_of_one(tmp_path):
    multiprocessing.spawn(train, (str(tmp_path),), nprocs=2)
    found, expected = torch.load(tmp_path / "gradients.pt"), gradients(*batch())
    assert set(found) == set(expected)
    assert any(name.startswith("roi_head.mask_head") for name in found)
    for name, grad in expected.items():
        close(found[name], grad, DENOMINATORS)
