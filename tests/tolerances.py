"""Every tolerance of the suite, with its reason. All are relative to the largest absolute expected value."""

import torch

# Sums of up to a few thousand float64 products in another order: only rounding, with a margin for cancellation.
FLOAT64 = 1e-10

# The same in float32 (unit roundoff 6e-8), one operator.
FLOAT32 = 1e-5

# The published 1.2e-7 in the denominators of detection losses, once in each of two processes instead of once, on counts
# of a hundred and more.
DENOMINATORS = 1e-8

# bf16 keeps 8 bits: a few rounding errors of inputs, kernels and output.
BFLOAT16 = 3e-2

# float16 keeps 11 bits, like every factor of a TF32 product: the same, eight times finer.
FLOAT16 = 4e-3
TF32 = 4e-3

# Tolerance by dtype for one operator that accumulates in 32 bits or more.
OF_DTYPE = {torch.float64: FLOAT64, torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

# A whole network in float32: errors of its layers add up. The project guarantees this for conversion and fusing.
NETWORK = 1e-4

# Key points read from heatmaps of a network in float32, in pixels of the image. DARK divides by second derivatives of
# the heatmap, which noise brings near 0: 0.1 was seen in OpenVINO. A wrong pixel of the heatmap is off by 4 or 8.
KEYPOINT_PIXELS = 0.5

# A whole network under bf16 autocast, as the L2 norm of the difference over that of the outputs: 50 layers with
# rounding errors of 4e-3 each, amplified by random weights. A wrong computation is off by 1.
NETWORK_BFLOAT16 = 0.2


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Assert max |actual - expected| <= tolerance * max(1, max |expected|), and equal shapes; finite on both sides."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    if not expected.numel():
        return
    a, b = actual.detach().double(), expected.detach().double()
    difference = (a - b).abs().max().item()
    scale = max(1.0, b.abs().max().item())
    assert difference <= tolerance * scale, f"differs by {difference:.3e}, allowed {tolerance:.0e} * {scale:.3e}"
