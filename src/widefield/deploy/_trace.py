"""Trace models to PyTorch graphs with dynamic sizes, and choose the form of routed layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import padding
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from widefield import _checks
from widefield.deploy._others import first_line, quiet
from widefield.nn import DCNv3, FusedMoRFConv2d, MoRFConv2d, SameAligned
from widefield.ops import fold, mixture_conv2d
from widefield.surgery.answers import plainly
from widefield.surgery.walk import copied, refuse_training, replace

ROUTING = ("branches", "per-sample", "blocked")
"""Forms of a layer whose kernel depends on the image.

- "branches": every expert convolves, and the results are summed with the routing weights. The convolutions have
  constant kernels, which runtimes prepare once.
- "per-sample": the experts' kernels are mixed for each image, which then has a convolution of its own: in a loop over
  the batch, or written out if the batch size is fixed (in one convolution of many groups if it is above 32). The
  fastest form in OpenVINO with a fixed batch size.
- "blocked": "per-sample" with the depthwise convolutions in onnxruntime's own layout (``.onnx`` only). The fastest form
  in onnxruntime on a CPU; no other runtime reads the file.

Layers without experts (Gaussian masks that depend on the image, timm's CondConv) support only "per-sample".
"""

DYNAMIC = ("batch", "size")

_MOST_ALIGNED = 2
"""Layers of :class:`SameAligned` with a stride in a graph with a dynamic size: one takes about a second, three 18."""


def bare(model: nn.Module) -> nn.Module:
    """Return the network inside wrappers such as torch.compile and DataParallel."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def prepared(model: nn.Module, routing: str, format: str) -> nn.Module:
    """Return a copy on the CPU with mixtures in the requested form and other layers in forms that runtimes support.

    Raises:
        RuntimeError: the model is in training mode.
        TypeError: parameters are not float32, the dtype of CPU runtimes and of verification.
        ValueError: unknown ``routing``, or a module with a replaced ``forward``
            (:func:`widefield.surgery.walk.copied`).
    """
    if _checks.choice("routing", routing, ROUTING) == "blocked" and format != "onnx":
        raise ValueError(
            f"routing='blocked' is a layout of onnxruntime, which does not read the format {format!r}: write an .onnx "
            "file, or pass routing='per-sample'."
        )
    model = bare(model)
    refuse_training(model, "an export holds the evaluation-mode function")
    others = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    if others:
        raise TypeError(f"exports need a float32 model; this one has {', '.join(sorted(others))}: call model.float().")
    twin = copied(model).cpu()
    replacements: dict[nn.Module, nn.Module] = {}
    for module in twin.modules():
        if isinstance(module, DCNv3) and format != "pt2":
            module.backend = "grid"
        elif isinstance(module, (MoRFConv2d, FusedMoRFConv2d)) and routing != "branches":
            module.backend = "merged"
        elif isinstance(module, MoRFConv2d):
            module.backend = "branches"
        elif isinstance(module, FusedMoRFConv2d):
            replacements[module] = _Branches(module)
    return replace(twin, replacements).eval()


class _Branches(nn.Module):
    """A fused mixture with its experts as separate constants again, which runtimes can prepare once."""

    def __init__(self, layer: FusedMoRFConv2d) -> None:
        super().__init__()
        self.router, self.shift = layer.router, layer.shift
        self.dilations, self.stride, self.groups = layer.dilations, layer.stride, layer.groups
        step = fold.common_dilation(layer.dilations)
        experts = enumerate(zip(layer.kernel_sizes, layer.dilations, strict=True))
        kernels = [fold.expert(layer.bank, r, size, dilation, step).clone() for r, (size, dilation) in experts]
        self.kernels = nn.ParameterList(nn.Parameter(kernel, False) for kernel in kernels)
        biases = None if layer.bias_bank is None else [nn.Parameter(bias.clone(), False) for bias in layer.bias_bank]
        self.biases = None if biases is None else nn.ParameterList(biases)

    def forward(self, x: Tensor) -> Tensor:
        y = mixture_conv2d(
            x,
            list(self.kernels),
            None if self.biases is None else list(self.biases),
            self.router(x),
            stride=self.stride,
            groups=self.groups,
            dilations=self.dilations,
            backend="branches",
        )
        return y if self.shift is None else y + self.shift[:, None, None]


def traced(model: nn.Module, x: Tensor, dynamic: Sequence[str]) -> ExportedProgram:
    """Trace a model in evaluation mode with :func:`torch.export.export`.

    The graph's outputs are tensors, alone or in tuples, lists and dictionaries: see
    :func:`widefield.surgery.answers.plainly`.

    Args:
        model: on the CPU.
        x: example input, (N, C, H, W), with any N.
        dynamic: sizes that may change: "batch" (N), "size" (H and W).

    Raises:
        ValueError: torch.export cannot trace the model, or not with these dynamic sizes. The message gives the reason
            and, where there is one, the alternative.
    """
    name = type(model).__name__
    aligned = [module for module in model.modules() if isinstance(module, SameAligned) and max(module.stride) > 1]
    if "size" in dynamic and len(aligned) > _MOST_ALIGNED:
        raise ValueError(
            f"{name} has {len(aligned)} layers with 'SAME' padding and a stride that do not merge into convolutions. "
            f"torch.export takes four times as long for each, so only {_MOST_ALIGNED} may have a dynamic size. Make "
            f"routing static first (widefield.specialize, then reparameterize), or fix the size: dynamic=('batch',)."
        )
    if "batch" in dynamic and len(x) == 1:
        x = torch.cat((x, x))  # a size of 1 would become a constant
    try:
        model = plainly(model, x)
        return _export(model, x, dynamic)
    except Exception as error:  # torch.export passes on any error of the model's code
        reason = _reason(error)
        for fewer in ([name for name in dynamic if name != "size"], []):
            if len(fewer) < len(dynamic) and _exports(model, x, fewer):
                fixed = " and ".join(name for name in dynamic if name not in fewer)
                raise ValueError(
                    f"{name} has no graph with a dynamic {fixed}: {reason} With a fixed one it has: "
                    f"pass dynamic={tuple(fewer)!r} and an example input of that {fixed}."
                ) from error
        raise ValueError(f"{name} cannot be traced by torch.export: {reason}") from error


def _export(model: nn.Module, x: Tensor, dynamic: Sequence[str]) -> ExportedProgram:
    # Not a named Dim, which rejects models that require a minimum size, as large kernels do. Not AUTO, which may
    # silently make a size constant.
    axes = (0,) * ("batch" in dynamic) + (2, 3) * ("size" in dynamic)
    sizes = dict.fromkeys(axes, Dim.DYNAMIC)
    with quiet(), _integer_padding(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        x = x.clone()  # torch.export marks the dynamic sizes on the tensor
        return torch.export.export(model, (x,), dynamic_shapes=(sizes,) if sizes else None)


@contextmanager
def _integer_padding() -> Iterator[None]:
    """Compute timm's "SAME" padding with integers in the block; the numbers are the same.

    timm rounds quotients of floats. With symbolic sizes these expressions nest from layer to layer, and torch.export
    does not finish.
    """
    original = padding.get_same_padding
    padding.get_same_padding = same_padding
    try:
        yield
    finally:
        padding.get_same_padding = original


def same_padding(x: int, kernel_size: int, stride: int, dilation: int) -> Any:
    """Return the number of zeros that "SAME" padding adds to ``x`` pixels, as ``timm.layers.get_same_padding`` does.

    Sizes may be symbols, as may the result.
    """
    span = fold.effective_size(kernel_size, dilation)
    zeros = (x + stride - 1) // stride * stride - stride + span - x
    if span < stride:  # else it is never negative, and without a maximum symbols stay simple
        return torch.sym_max(zeros, 0)
    return zeros


def _exports(model: nn.Module, x: Tensor, dynamic: Sequence[str]) -> bool:
    try:
        _export(model, x, dynamic)
    except Exception:  # any error of the model's code, as above, means that it cannot be exported
        return False
    return True


def _reason(error: Exception) -> str:
    text = str(error)
    found = re.findall(r"\.(?:size\(\)|shape)\[(\d)\][^\n]*?constant \((\d+)\)", text)
    names = {"0": "batch", "2": "height", "3": "width"}
    fixed = [f"{names.get(axis, axis)} {value}" for axis, value in dict(found).items()]
    return f"its code works for {' and '.join(fixed)} only." if fixed else first_line(error)
