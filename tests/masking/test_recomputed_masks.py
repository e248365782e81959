"""Gradient checkpointing of masked autoencoders: recomputed blocks see the mask of the forward pass."""

import copy

import pytest
import torch

from tolerances import NETWORK, close
from widefield.masking import MaskedAutoencoder
from widefield.nn import Recomputing

NETWORKS = {
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},  # GRN
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)},  # batch norms
    "van_b0": {"depths": (1, 1, 1, 1), "widths": (8, 8, 8, 8)},  # recomputed by widefield, not by timm
}


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputed_blocks_see_the_mask(name):
    torch.manual_seed(0)
    model = MaskedAutoencoder(name, "fcmae", **NETWORKS[name]).train()
    images, masks = torch.randn(2, 2, 3, 64, 64), torch.rand(2, 2, 2, 2).argsort(-1) > 0
    results = []
    for checkpointing in (False, True):
        twin = copy.deepcopy(model)
        for module in twin.encoder.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = checkpointing
        for batch, mask in zip(images, masks, strict=True):
            torch.manual_seed(1)
            loss = sum(twin(batch, mask).values())
            with Recomputing(twin):
                loss.backward()
            assert twin.visibility.mask is None
        results.append((loss.detach(), [p.grad for p in twin.parameters()], twin.state_dict()))
    (loss, gradients, state), (again, of_again, state_again) = results
    assert torch.equal(again, loss)
    for one, other in zip(gradients, of_again, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(other, one, NETWORK)
    assert all(torch.equal(state_again[key], value) for key, value in state.items())
