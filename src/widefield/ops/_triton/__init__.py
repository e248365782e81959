"""Provide GPU kernels for depthwise convolution in Triton; only this subpackage imports triton.

Importing it does not import triton. Import its modules only if :func:`unavailable` returns None:

- :mod:`.direct`: multiply-add kernels for small kernels, any stride and dilation, both memory formats.
- :mod:`.gemm`: tensor-core kernels for large kernels, stride 1.
- :mod:`.routed`: mixtures of experts, with kernels mixed inside the convolution.
- :mod:`.tune`: choice of block sizes, measured once per kind of problem.

The first two are backends of one primitive and have the same four functions: ``why_not``, ``forward``, ``input_grad``
and ``weight_grad``.
"""

from __future__ import annotations

import importlib.util

import torch


def unavailable() -> str | None:
    """Return why Triton cannot be used here, or None if it can. Does not import triton."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # origin is None for a plain folder named triton
        return "triton is not installed (it comes with PyTorch for CUDA on Linux)"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None
