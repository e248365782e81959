"""Predict images from the maps of an encoder that saw visible patches. Names of modules are those of published files.

A decoder takes the encoder's maps, finest first, and the mask, and returns (N, channels, H / step, W / step), where
channels and step are those of the target: (3, 1) for pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from widefield import _checks
from widefield.masking.patches import stretched
from widefield.masking.rules import rule_of
from widefield.masking.visibility import Visibility, treat
from widefield.nn import GRN

_EPS = 1e-6


class LinearDecoder(nn.Module):
    """A 1x1 convolution of the last map, whose outputs are the values of a patch: Xie et al., "SimMIM", CVPR 2022,
    section 3.3. Keys ``decoder.0`` (in A2MIM's files ``decoder_pred.0``).

    Args:
        in_channels: of the last map.
        stride: of the last map.
        channels, step: of the target.
    """

    def __init__(self, in_channels: int, stride: int, *, channels: int = 3, step: int = 1) -> None:
        super().__init__()
        side = _fitting(stride, step)
        self.decoder = nn.Sequential(nn.Conv2d(in_channels, channels * side**2, 1), nn.PixelShuffle(side))

    def forward(self, maps: Sequence[Tensor], mask: Tensor) -> Tensor:
        """See the module's docstring."""
        y: Tensor = self.decoder(maps[-1])
        return y


class _Block(nn.Module):
    """A block of ConvNeXt V2, without drop path, under its published names: (N, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, _EPS)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.grn = GRN(4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(self.grn(F.gelu(self.pwconv1(y))))
        out: Tensor = x + y.permute(0, 3, 1, 2)
        return out


class ConvNeXtDecoder(nn.Module):
    """Blocks of ConvNeXt V2 on the last map, with a token at masked positions: Woo et al., "ConvNeXt V2", CVPR 2023,
    section 3.1. Keys ``proj``, ``mask_token``, ``decoder.0`` ..., ``pred``.

    Args:
        in_channels: of the last map.
        stride: of the last map.
        channels, step: of the target.
        width: channels of the blocks.
        depth: number of blocks.
    """

    def __init__(
        self, in_channels: int, stride: int, *, channels: int = 3, step: int = 1, width: int = 512, depth: int = 1
    ) -> None:
        super().__init__()
        self.side = _fitting(stride, step)
        self.channels = channels
        self.mask_token = nn.Parameter(torch.empty(1, _checks.integer("width", width), 1, 1))
        self.proj = nn.Conv2d(in_channels, width, 1)
        self.decoder = nn.Sequential(*(_Block(width) for _ in range(_checks.integer("depth", depth))))
        self.pred = nn.Conv2d(width, channels * self.side**2, 1)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor], mask: Tensor) -> Tensor:
        """See the module's docstring."""
        x = self.proj(maps[-1])
        x = torch.where(stretched(mask, *x.shape[2:])[:, None], self.mask_token.to(x.dtype), x)
        y = self.pred(self.decoder(x))
        # a patch is stored as (row, column, channel), and PixelShuffle reads (channel, row, column)
        y = y.unflatten(1, (self.side**2, self.channels)).transpose(1, 2).flatten(1, 2)
        return F.pixel_shuffle(y, self.side)


class _UpBlock(nn.Module):
    """A transposed convolution that doubles the map, and two 3x3 convolutions: (N, C, H, W) -> (N, C_out, 2H, 2W)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.up_sample = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU6(inplace=True),
            nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.up_sample(x))
        return y


class _UpPath(nn.Module):
    """SparK's decoder proper: keys ``dec.0`` ..., ``proj``."""

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.dec = nn.ModuleList(_UpBlock(a, b) for a, b in itertools.pairwise(widths))
        self.proj = nn.Conv2d(widths[-1], channels, 1)

    def forward(self, maps: Sequence[Tensor | None]) -> Tensor:
        """Take a map for each step, coarsest first, None where there is none."""
        x: Tensor | None = None
        for block, skip in zip(self.dec, maps, strict=True):
            if skip is not None:
                x = skip if x is None else x + skip
            x = block(x)
        y: Tensor = self.proj(x)
        return y


class UNetDecoder(nn.Module):
    """A U-Net's way up from all maps, with a token for each scale at masked positions: Tian et al., SparK, ICLR 2023,
    section 3.3. Keys ``densify_norms``, ``densify_projs``, ``mask_tokens``, ``dense_decoder``.

    Args:
        in_channels: of each map, finest first.
        strides: of each map, powers of two.
        visibility: the mask, for batch norms before the tokens.
        channels, step: of the target.
        width: channels at the coarsest map; they halve at each step.
        norm: "batch" or "layer": norm before the tokens. Published: batch for ResNets, layer for ConvNeXts.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        visibility: Visibility,
        *,
        channels: int = 3,
        step: int = 1,
        width: int = 768,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        _checks.choice("norm", norm, ("batch", "layer"))
        steps = _doublings(strides, step)
        if _checks.integer("width", width) % 2**steps:
            raise ValueError(f"width must be a multiple of {2**steps}, as it halves {steps} times; got {width}.")
        coarsest = strides[-1]
        self.places = [int(math.log2(coarsest // stride)) for stride in reversed(strides)]
        self.densify_norms, self.densify_projs = nn.ModuleList(), nn.ModuleList()
        self.mask_tokens = nn.ParameterList()
        for place, wide in zip(self.places, reversed(in_channels), strict=True):
            out = width >> place
            self.densify_norms.append(nn.BatchNorm2d(wide) if norm == "batch" else LayerNorm2d(wide, _EPS))
            kernel = 3 if place else 1
            same = not place and wide == out
            self.densify_projs.append(nn.Identity() if same else nn.Conv2d(wide, out, kernel, padding=kernel // 2))
            self.mask_tokens.append(nn.Parameter(torch.empty(1, wide, 1, 1)))
        self.dense_decoder = _UpPath([width >> i for i in range(steps + 1)], channels)
        treat(self.densify_norms, visibility, rule_of)
        self._initialize()

    def _initialize(self) -> None:
        for token in self.mask_tokens:
            nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
        for module in self.dense_decoder.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def dense(self, maps: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        """Return the maps with tokens at masked positions and the decoder's channels, coarsest first."""
        filled = []
        parts = zip(reversed(maps), self.densify_norms, self.densify_projs, self.mask_tokens, strict=True)
        for x, norm, proj, token in parts:
            hidden = stretched(mask, *x.shape[2:])[:, None]
            filled.append(proj(torch.where(hidden, token.to(x.dtype), norm(x))))
        return filled

    def forward(self, maps: Sequence[Tensor], mask: Tensor) -> Tensor:
        """See the module's docstring."""
        by_place = dict(zip(self.places, self.dense(maps, mask), strict=True))
        y: Tensor = self.dense_decoder([by_place.get(place) for place in range(len(self.dense_decoder.dec))])
        return y


def _fitting(stride: int, step: int) -> int:
    if stride % step:
        raise ValueError(f"a target with steps of {step} pixels does not fit a map of stride {stride}.")
    return stride // step


def _doublings(strides: Sequence[int], step: int) -> int:
    """Return how often the coarsest map is doubled; raises ValueError if doubling does not meet all strides."""
    for stride in strides:
        times = math.log2(strides[-1] / stride)
        if times != int(times) or stride < step:
            raise ValueError(
                f"a U-Net doubles maps of stride {strides[-1]} until the target's {step}, and never meets one of "
                f"stride {stride}. Choose other maps with out_indices, or another decoder."
            )
    steps = math.log2(strides[-1] / step)
    if steps != int(steps):
        raise ValueError(f"a U-Net doubles its maps, and {strides[-1]} is not {step} times a power of two.")
    return int(steps)
