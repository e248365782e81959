"""Provide the layers after InternImage's stages: Wang et al., CVPR 2023; keys and numbers of the official code."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F

from widefield.nn.deform import keyed
from widefield.nn.fusing import fold_norm, refuse_training


def layer_norm(width: int) -> nn.Sequential:
    """Return LayerNorm over channels last, with the key that it has in the official code."""
    return keyed(0, LayerNorm(width))


class ConvHead(nn.Sequential):
    """Pointwise convolution, batch norm, GELU; mergeable.

    Args:
        width, out_width: input and output channels.
    """

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__(nn.Conv2d(width, out_width, 1, bias=False), keyed(0, nn.BatchNorm2d(out_width)), nn.GELU())

    def fuse(self) -> nn.Sequential:
        """Return the convolution, now with a bias, and the activation. Exact in evaluation mode.

        Raises:
            RuntimeError: in training mode.
        """
        refuse_training(self)
        conv, norm, activation = self
        return nn.Sequential(fold_norm(conv, norm[0]), activation).eval()  # type: ignore[index]


class AttentionPool(nn.Module):
    """Multi-head attention of a map's mean to its pixels: (N, C, H, W) -> (N, C_out).

    Args:
        width: C.
        out_width: C_out.
        heads: number of attention heads.
    """

    def __init__(self, width: int, out_width: int, heads: int) -> None:
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = layer_norm(width), layer_norm(width), layer_norm(width)
        self.cross_dcn = CrossAttention(width, out_width, heads)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out)."""
        x = x.flatten(2).transpose(1, 2)
        query = self.norm1_q(x.mean(1, keepdim=True))
        y: Tensor = self.cross_dcn(query, self.norm1_k(x), self.norm1_v(x))
        return y.squeeze(1)


class CrossAttention(nn.Module):
    """Attention between sequences, with the biases of its projections in separate parameters.

    Args:
        width: channels of the sequences.
        out_width: channels of the output.
        heads: number of attention heads; divides ``width``.
    """

    def __init__(self, width: int, out_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.k_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, out_width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(N, L_q, C), twice (N, L, C) -> (N, L_q, C_out)."""
        given = ((self.q, self.q_bias, query), (self.k, self.k_bias, key), (self.v, self.v_bias, value))
        q, k, v = (
            F.linear(x, layer.weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, bias, x in given
        )
        y: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y
