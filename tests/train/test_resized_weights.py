"""Weights for smaller kernels, or for global filters of another size, fit a network for larger images."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from tolerances import FLOAT32, close
from widefield.tasks import Classification
from widefield.train import Recipe, build_model
from widefield.train.pretrained import resized
from widefield.train.recipe import DataSpec, ModelSpec

FOCALNET = {"mlp_ratio": 0.25}  # small, as its depths and width are fixed
HORNET = {"depths": [1, 1, 1, 1], "widths": [8, 16, 16, 32]}
FILTERS = [None, None, [14, 8], [7, 4]]


def saved(folder: Path, name: str, **args: Any) -> tuple[torch.nn.Module, str]:
    """Return a network with drawn weights for three classes, and its file."""
    network = timm.create_model(name, num_classes=3, **args).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = folder / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, path)
    return network, str(path)


def started(name: str, pretrained: str, **args: Any) -> Any:
    recipe = Recipe("name", ModelSpec(name, args, pretrained), DataSpec("digits"))
    return build_model(recipe, Classification(3)).eval()


def test_zeros_around_smaller_kernels_keep_the_function(tmp_path: Path) -> None:
    plain, path = saved(tmp_path, "focalnet_tiny_srf", **FOCALNET)
    grown = started("focalnet_tiny_srf", path, **FOCALNET, focal_windows=[9, 9, 9, 9])
    layers = [
        conv.kernel_size
        for name, conv in grown.named_modules()
        if "focal_layers" in name and hasattr(conv, "kernel_size")
    ]
    assert layers == [(9, 9), (11, 11)] * 12
    x = torch.randn(2, 3, 64, 96)
    close(grown(x), plain(x), FLOAT32)


def test_global_filters_keep_their_gains_at_the_ends_of_the_spectrum(tmp_path: Path) -> None:
    plain, path = saved(tmp_path, "hornet_tiny_gf", **HORNET, global_filters=FILTERS)
    grown = started("hornet_tiny_gf", path, **HORNET, global_filters=[None, None, [24, 13], [12, 7]])
    old, new = plain.state_dict(), grown.state_dict()
    names = [name for name in old if name.endswith("complex_weight")]
    assert [tuple(new[name].shape[1:3]) for name in names] == [(24, 13), (12, 7)]
    for name in names:
        close(new[name][:, :: len(new[name][0]) - 1, 0], old[name][:, :: len(old[name][0]) - 1, 0], FLOAT32)
    flat = torch.ones(4, 14, 8, 2)
    found = resized({"a.complex_weight": flat}, {"a.complex_weight": torch.Size([4, 24, 13, 2])})
    assert found is not None
    close(found["a.complex_weight"], torch.ones(4, 24, 13, 2), FLOAT32)


@pytest.mark.parametrize("windows", [[1, 1, 1, 1], [4, 4, 4, 4]])
def test_kernels_that_cannot_hold_the_weights_are_refused(tmp_path: Path, windows: list[int]) -> None:
    _, path = saved(tmp_path, "focalnet_tiny_srf", **FOCALNET)
    with pytest.raises(ValueError, match="focal_layers"):
        started("focalnet_tiny_srf", path, **FOCALNET, focal_windows=windows)


def test_dense_kernels_and_fitting_weights_are_left_alone() -> None:
    assert resized({"conv": torch.ones(4, 2, 3, 3)}, {"conv": torch.Size([4, 2, 5, 5])}) is None
    assert resized({"conv": torch.ones(4, 1, 3, 3)}, {"conv": torch.Size([4, 1, 3, 3])}) is None
    assert resized({"conv": torch.ones(4, 1, 3, 3)}, {}) is None
