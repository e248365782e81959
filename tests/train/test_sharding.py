"""A sharded model in two processes that call it unequally often, as an evaluation of images of several sizes does."""

from __future__ import annotations

import copy
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tolerances import NETWORK, close
from widefield import dense
from widefield.train.sharding import Sharded


def _process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, world_size=2, rank=rank, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    model = dense.UPerNet(
        "convnext_atto", 3, channels=8, auxiliary=False, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), dropout=0.0
    )
    plain, images = copy.deepcopy(model).eval(), [torch.randn(1, 3, 64, 64 + 8 * index) for index in range(3)]
    sharded = Sharded(model, "no")
    sharded.model.eval()
    with torch.no_grad(), sharded.gathered():
        for image in images[: 1 + 2 * rank]:  # three calls in the second process
            close(sharded.model(image), plain(image), NETWORK)
    for image in images[1:]:  # training goes on, on shards
        optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (sharded.model, plain)]
        for each, optimizer in zip((sharded.model, plain), optimizers, strict=True):
            nn.functional.cross_entropy(each(image), torch.zeros(1, *image.shape[2:], dtype=torch.int64)).backward()
            optimizer.step()
    assert all(type(parameter).__name__ == "DTensor" for parameter in sharded.model.parameters())
    weights = sharded.whole().state_dict()
    if rank == 0:
        for name, expected in plain.state_dict().items():
            close(weights[name], expected, NETWORK)
    Path(folder, str(rank)).touch()
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_evaluate_on_their_own_and_train_together(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, str(tmp_path)), nprocs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
