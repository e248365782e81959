"""Global response normalization: Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders",
CVPR 2023, section 3, eq. 1-3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.nn._leaf import is_symbolic, recorded
from widefield.ops._problem import size_of


class GRN(nn.Module):
    """Scale each channel by its L2 norm over the map, relative to the mean norm of all channels, and add the input.

    ``x * (1 + gamma * N) + beta`` with ``N = |x_c| / (mean over c of |x_c| + eps)``: eq. 1 to 3, with the residual.
    (N, H, W, C) -> the same, in the dtype of the input. ``timm.layers.grn.GlobalResponseNorm`` computes the same with
    other keys and shapes (``weight``, ``bias``, (C,)). This layer has the keys of the official weights, and a form
    without bias for reparameterized networks.

    Norms and their ratio are computed in float32 at least: a norm over pixels grows with the root of their number, and
    16 bits would lose ``eps``.

    Args:
        channels: C.
        use_bias: whether there is a ``beta``.
        eps: added to the mean norm.

    Attributes:
        gamma, beta: (1, 1, 1, C), zero at first, so that a new layer is the identity; ``beta`` may be None.

    Raises:
        TypeError, ValueError: channels that are not a positive integer, a negative ``eps``.
    """

    beta: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        use_bias: bool = True,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = _checks.integer("channels", channels)
        self.eps = _checks.number("eps", eps)
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, self.channels, device=device, dtype=dtype))
        self.register_parameter("beta", nn.Parameter(torch.zeros_like(self.gamma)) if use_bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C); raises ValueError for another shape."""
        if is_symbolic(x):
            return recorded(self, x)
        if x.ndim != 4 or size_of(x)[-1] != self.channels:
            raise ValueError(
                f"the input must be (N, H, W, {self.channels}); got shape {tuple(x.shape)}. "
                "Bring a map to channels last with x.permute(0, 2, 3, 1)."
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide)
        scale = 1 + self.gamma * (norm / (norm.mean(-1, keepdim=True) + self.eps))
        y: Tensor = x * scale.to(x.dtype)
        return y if self.beta is None else y + self.beta.to(x.dtype)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.channels}, use_bias={self.beta is not None}, eps={self.eps}"
