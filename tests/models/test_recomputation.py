"""Gradient checkpointing of every family: the same numbers, in less memory."""

import copy

import pytest
import timm
import torch
from networks import BACKBONES, settled, small
from torch import nn

from tolerances import NETWORK, close
from widefield.nn import Recomputing
from widefield.surgery import MoRF, convert

FAMILIES = [*BACKBONES, "mobilenetv2_lk", "morf_convnext_tiny", "morf_resnet18"]


def step(model, images, *, within=None):
    """Return the output of a step, gradients and buffers after it, and the bytes that live between its two passes."""
    torch.manual_seed(1)
    with torch.profiler.profile(profile_memory=True) as memory:
        y = model(images)
    held = sum(event.self_cpu_memory_usage for event in memory.key_averages())
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    if within is None:
        loss.backward()
    else:
        with within:
            loss.backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers()), held


def check(model, again, images, *, within=None, share=0.8):
    """Compare a step of a model with one of a copy that recomputes blocks. ``share``: of the memory, at most."""
    y, gradients, buffers, held = step(model, images)
    y_again, gradients_again, buffers_again, held_again = step(again, images, within=within)
    assert torch.equal(y_again, y)
    for name, gradient in gradients.items():
        close(gradients_again[name], gradient, NETWORK)
    assert buffers.keys() == buffers_again.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffers_again[name], buffer), name
    assert held_again <= share * held, (held_again, held)


@pytest.mark.parametrize("name", FAMILIES)
def test_recomputed_blocks_change_no_number_and_save_memory(name):
    model = settled(small(name, drop_path_rate=0.3, drop_rate=0.2)).train()
    again = copy.deepcopy(model)
    again.set_grad_checkpointing()
    check(model, again, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("name", ["van_b0", "morf_convnext_tiny", "morf_resnet18"])
def test_recomputation_can_be_switched_off_and_acts_in_training_only(name):
    model = settled(small(name))
    model.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64)
    held = step(copy.deepcopy(model).eval(), x)[-1]
    model.set_grad_checkpointing(False)
    assert step(model.train(), x)[-1] >= held


def test_the_backward_pass_may_run_twice():
    model = settled(small("replknet_31b")).train()
    model.set_grad_checkpointing()
    loss = model(torch.randn(4, 3, 64, 64)).square().sum()
    before = copy.deepcopy(dict(model.named_buffers()))
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, once in zip(model.parameters(), first, strict=True):
        close(p.grad, 2 * once, NETWORK)
    assert all(torch.equal(after, before[name]) for name, after in model.named_buffers())


def test_timms_networks_converted_or_not_see_batches_once_inside_the_context():
    model = settled(convert(timm.create_model("test_resnet", num_classes=7), MoRF((3, 5)))).train()
    again = copy.deepcopy(model)
    again.set_grad_checkpointing()
    check(model, again, torch.randn(4, 3, 64, 64), within=Recomputing(again), share=0.9)


def test_batch_norms_get_their_own_statistics_back():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3).eval())
    buffers = dict(model.named_buffers())
    before = copy.deepcopy(buffers)

    def interrupted():
        with Recomputing(model), Recomputing(model[0]):
            model(torch.randn(8, 3))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert all(value is buffers[name] and torch.equal(value, before[name]) for name, value in model.named_buffers())
