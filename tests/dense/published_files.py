"""Small segmenters of every family with published segmentation files, and such files with made weights.

Names and numbers of dimensions come from the fixtures in tests/fixtures/conformance, whose networks are wider.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import timm
import torch
from timm.models import FeatureListNet
from timm.models.focalnet import FocalNet
from torch import Tensor, nn

from widefield import dense

FIXTURES = Path(__file__).parents[1] / "fixtures" / "conformance"

NARROW = {
    "convnext_tiny": {"dims": (8, 16, 16, 24)},
    "convnextv2_atto": {"dims": (8, 16, 16, 24)},
    "hornet_tiny_7x7": {"widths": (8, 16, 32, 64)},
    "hornet_tiny_gf": {"widths": (8, 16, 32, 64)},
    "internimage_t": {"widths": (16, 32, 48, 64), "groups": (1, 2, 3, 4)},
    "moganet_xtiny": {"widths": (8, 16, 16, 24)},
    "replknet_31b": {"widths": (8, 16, 16, 24)},
    "slak_tiny": {"widths": (8, 16, 16, 24), "width_factor": 1.0},
    "unireplknet_a": {"widths": (8, 16, 16, 24)},
    "van_b0": {"widths": (8, 16, 16, 24)},
}
"""Name in timm -> arguments of the narrow network; all have the depths of the fixture."""

NORMED = {"convnext_tiny", "convnextv2_atto", "hornet_tiny_7x7", "hornet_tiny_gf", "unireplknet_a", "focalnet_tiny_srf"}
"""Families whose published segmentation code adds norms to the stages' maps."""

FIXTURE_NAMES = (*NARROW, "focalnet_tiny_srf")

IMAGES = torch.randn(1, 3, 70, 90, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
"""Images whose sides are not multiples of 32."""

CLASSIFIER = ("norm.", "head.", "conv_head.")
"""Prefixes of weights that only classifiers have."""


def network(name: str) -> nn.Module:
    """Return a narrow network that returns features, with the depths of its fixture."""
    if name == "focalnet_tiny_srf":
        return FeatureListNet(focalnet(), out_indices=(0, 1, 2, 3), flatten_sequential=True)
    return timm.create_model(name, features_only=True, **NARROW[name])


def focalnet(windows: int = 3) -> FocalNet:
    """Return a narrow FocalNet-T as a classifier; timm's function fixes the width."""
    return FocalNet(
        depths=(2, 2, 6, 2), embed_dim=8, num_classes=5, focal_windows=(windows,) * 4, layerscale_value=None
    )


def segmenter(name: str, classes: int = 5, **options: object) -> dense.UPerNet:
    """Return a small UPerNet on a narrow network."""
    torch.manual_seed(0)
    return dense.UPerNet(network(name), classes, channels=8, auxiliary_channels=8, **options)


@cache
def official(name: str, form: str = "state_dict") -> dict[str, list[int]]:
    """Return the keys and shapes of the official backbone: without a classifier, with the norms after the stages."""
    document = json.loads((FIXTURES / f"{name}.json").read_text())
    shapes = document[form] if form == "state_dict" else document[form]["state_dict"]
    shapes = {key: shape for key, shape in shapes.items() if not key.startswith(CLASSIFIER)}
    if name in NORMED:
        shapes |= {f"norm{stage}.{part}": [0] for stage in range(4) for part in ("weight", "bias")}
    return shapes


def made_weights(shapes: dict[str, Tensor | torch.Size]) -> dict[str, Tensor]:
    """Return a random tensor for each name, positive for variances; integers for counts of batches."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for key, like in shapes.items():
        shape = like.shape if isinstance(like, Tensor) else like
        if key.endswith("num_batches_tracked"):
            made[key] = torch.tensor(7)
        else:
            made[key] = torch.randn(tuple(shape), generator=generator) * 0.2
            if key.endswith(("running_var", "norm.weight", "bn.weight")):
                made[key] = made[key].abs() + 0.5
    return made


def saved(model: nn.Module, folder: Path, **options: object) -> dict[str, Tensor]:
    """Return the weights that a model has in its published file."""
    path = folder / "saved.pth"
    dense.save_checkpoint(model, path, **options)
    content = torch.load(path, weights_only=True)
    return content["state_dict"]


def backbone_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the backbone without their prefix."""
    return {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}


def write(weights: dict[str, Tensor], path: Path, **extra: object) -> Path:
    """Write a file as mmsegmentation does."""
    torch.save({"meta": {}, "state_dict": weights, **extra}, path)
    return path


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether two dictionaries of weights are equal to the bit, with shapes and types."""
    return one.keys() == other.keys() and all(
        value.dtype == other[key].dtype and value.shape == other[key].shape and torch.equal(value, other[key])
        for key, value in one.items()
    )
