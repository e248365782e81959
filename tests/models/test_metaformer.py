"""One macro architecture with every mixer: each one trains a step, exports and returns features."""

import pytest
import timm
import torch
from torch import nn

import widefield
from tolerances import NETWORK, close
from widefield.models.metaformers import NORMS, MetaFormer
from widefield.nn.mixers import CHANNEL_MIXERS, TOKEN_MIXERS

SMALL = {"depths": (1, 1, 2, 1), "widths": (16, 32, 48, 64), "num_classes": 5}
PLAIN = {"attention", "deformable", "focal", "gnconv", "lka", "pooling"}
"""Token mixers without anything to merge."""


def small(**arguments):
    return timm.create_model("metaformer_tiny", **{**SMALL, **arguments})


def test_there_are_eleven_token_mixers():
    assert len(TOKEN_MIXERS) == 11


@pytest.mark.parametrize("mixer", TOKEN_MIXERS)
def test_every_token_mixer_trains_a_step_and_gives_features(mixer):
    model = small(token_mixer=mixer, layer_scale=0.5).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    before = torch.nn.functional.cross_entropy(model(x), labels)
    before.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert torch.nn.functional.cross_entropy(model(x), labels) < before
    features = model.eval().forward_intermediates(torch.randn(1, 3, 75, 90), intermediates_only=True)
    assert [tuple(f.shape[1:]) for f in features] == [(16, 18, 22), (32, 9, 11), (48, 4, 5), (64, 2, 2)]


@pytest.mark.parametrize("mixer", TOKEN_MIXERS)
def test_every_token_mixer_exports_and_merges_where_it_can(mixer):
    model = small(token_mixer=mixer, layer_scale=0.5, depths=(1, 1, 1, 1)).eval()
    x = torch.randn(2, 3, 64, 64)
    fused = model if mixer in PLAIN else widefield.reparameterize(model, x)
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},))
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        close(program.module()(x), model(x), NETWORK)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mixer", CHANNEL_MIXERS)
def test_channel_mixers_and_norms(mixer, norm):
    model = small(channel_mixer=mixer, norm=norm, layer_scale=0, expansion=2).train()
    assert not any("scale1" in name for name, _ in model.named_parameters())
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_any_module_is_a_mixer_and_stages_may_differ():
    class Shift(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.channels = channels

        def forward(self, x):
            return x.roll(1, -1)

    model = small(
        token_mixer=[Shift, "conv", lambda channels: nn.Conv2d(channels, channels, 3, padding=1), "attention"]
    )
    kinds = [type(stage[0].token_mixer).__name__ for stage in model.stages]
    assert kinds == ["Shift", "DepthwiseConv2d", "Conv2d", "Attention2d"]
    assert model.stages[0][0].token_mixer.channels == 16
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_sizes_are_those_of_convnext():
    """ConvNeXt's block has one norm and one shortcut. With two of each and the same convolutions, a block has one more
    norm."""
    with torch.device("meta"):
        ours, theirs = timm.create_model("metaformer_tiny"), timm.create_model("convnext_tiny")
    more = sum(3 * depth * width for depth, width in zip((3, 3, 9, 3), (96, 192, 384, 768), strict=True))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) + more


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_mixer": "cnv"}, "token_mixer must be one of .*Did you mean 'conv'"),
        ({"channel_mixer": "mpl"}, "channel_mixer must be one of .*Did you mean 'mlp'"),
        ({"norm": "instance"}, "norm must be one of"),
        ({"token_mixer": ["conv", "lka"]}, "one for each of 4 stages; got 2"),
        ({"token_mixer": nn.Identity()}, "token_mixer must be one of"),
        ({"depths": (1, 1)}, "depths and widths must be as many"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_the_class_is_public():
    assert isinstance(small(), MetaFormer)
