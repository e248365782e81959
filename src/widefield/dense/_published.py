"""Set up backbones as in the published segmentation code, where it differs from the code for classification."""

from __future__ import annotations

from torch import nn

VAN_EPS = 1e-5
"""The eps of the norms after VAN's stages: its segmentation code takes PyTorch's default, the other 1e-6."""


def follow_published_code(body: nn.Module) -> None:
    """Set up a network in place as the published segmentation code of its family has it.

    - VAN: the norms after the stages have the eps :data:`VAN_EPS`.
    """
    for network in body.modules():
        if type(network).__name__ == "VAN":
            for name, norm in network.named_children():
                if name.startswith("norm") and hasattr(norm, "eps"):
                    norm.eps = VAN_EPS  # type: ignore[assignment]
