"""Convert PyTorch graphs to ONNX, including convolutions with per-sample kernels."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten_with_path

from widefield import _checks
from widefield.deploy._blocked import to_blocked
from widefield.deploy._others import first_line, quiet

LEAST_OPSET, MOST_OPSET = 18, 23
"""Opsets that torch's exporter writes and onnxruntime reads."""


def to_onnx(program: ExportedProgram, path: Path, opset: int | None, *, blocked: bool = False) -> Counter[str]:
    """Write a graph as ONNX; weights that exceed the size limit of a protobuf go into a separate file next to it.

    Args:
        program: of the model.
        path: ONNX file.
        opset: :data:`LEAST_OPSET` to :data:`MOST_OPSET`; None for the default of torch's exporter.
        blocked: rewrite depthwise convolutions with per-sample kernels for onnxruntime; see
            :mod:`widefield.deploy._blocked`.

    Returns:
        operator -> number of its nodes.

    Raises:
        ValueError: the graph has an operator without an ONNX equivalent, or Fourier transforms of maps of any size; the
            message names it.
    """
    from onnx_ir.passes import PassError

    table: dict[Any, Any] = {torch.ops.aten.conv2d.default: _convolution}
    if hasattr(torch.ops.widefield, "nms_mask"):  # of detectors, which define it
        table[torch.ops.widefield.nms_mask.default] = _suppression
    if not all(isinstance(size, int) for size in image_shape(program)[2:]):
        _refuse_transforms(program)
        table[torch.ops.aten.adaptive_avg_pool2d.default] = _adaptive_pooling
    if opset is not None:
        opset = _checks.integer("opset", opset, minimum=LEAST_OPSET, maximum=MOST_OPSET)
    write = partial(
        torch.onnx.export, program, dynamo=True, verbose=False, opset_version=opset, custom_translation_table=table
    )
    try:
        with quiet():
            try:
                written = write()
            except PassError:  # the optimizer of the graph fails on some operators; the graph is right without it
                written = write(optimize=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(f"the model has no form in ONNX: {_missing(error)}") from error
    model = cast(Any, written).model
    _rename(model, model.graph.inputs[0], "images")
    spec = program.call_spec.out_spec
    names = [] if spec is None else output_names(spec.unflatten(list(range(spec.num_leaves))))
    for value, name in zip(model.graph.outputs, names, strict=True):
        _rename(model, value, name)
    _name_sizes(model, image_shape(program))
    if blocked:
        to_blocked(model)
    cast(Any, written).save(str(path))
    return Counter(node.op_type for node in model.graph.all_nodes())


def _refuse_transforms(program: ExportedProgram) -> None:
    """Raise ValueError for Fourier transforms in a graph with a dynamic height and width.

    onnxruntime 1.31 infers the size of a one-sided transform wrongly if the size is dynamic, and stops when it runs.
    """
    found = sorted({str(node.target).removesuffix(".default") for node in program.graph.nodes if "fft" in node.name})
    if found:
        raise ValueError(
            f"the model has no ONNX graph with a dynamic size: it computes {', '.join(found)}, and onnxruntime runs "
            "Fourier transforms of maps of one size only. With a fixed size it has one: pass dynamic=('batch',) and an "
            "example input of that size. An archive of PyTorch (.pt2) may have a dynamic one."
        )


def image_shape(program: ExportedProgram) -> tuple[int | None, ...]:
    """Return the shape of a graph's images, (N, C, H, W), with None for each dynamic size."""
    shapes = [
        tuple(dim if isinstance(dim, int) else None for dim in node.meta["val"].shape)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    return shapes[0]


def output_names(outputs: Any) -> list[str]:
    """Return a name for each output tensor: its keys in dicts, "output" and its indices in tuples."""
    paths = [path for path, _ in tree_flatten_with_path(outputs)[0]]
    keys = ["_".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path) for path in paths]
    return ["_".join(filter(None, ("output" if key[:1].isdigit() or not key else "", key))) for key in keys]


def _rename(model: Any, value: Any, name: str) -> None:
    """Rename an input or output; any other value with that name gets the suffix "_inside"."""
    others = [*model.graph.initializers.values(), *(v for node in model.graph.all_nodes() for v in node.outputs)]
    for other in others:
        if other is not value and other.name == name:
            other.name = f"{name}_inside"
    value.name = name


def _missing(error: BaseException | None) -> str:
    """Return the operator that the exporter does not support, or else the innermost error message."""
    texts, cause = [], error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    found = re.findall(r"(?:decompositions|ONNX function)[^\n]*?OpOverload\(op='([^']+)'", "\n".join(texts))
    if found:
        return f"there is none of the operator {found[0]}."
    return first_line(Exception(texts[-1]))


def _name_sizes(model: Any, shape: Sequence[int | None]) -> None:
    """Rename dynamic sizes to "batch", "height" and "width"; torch names them s77 and the like."""
    images = model.graph.inputs[0]
    names = {}
    for dim, fixed, name in zip(images.shape, shape, ("batch", "channels", "height", "width"), strict=True):
        if fixed is None:
            names[str(dim.value)] = name
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    import onnx_ir as ir

    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            # Unknown sizes stay unnamed: runtimes assume that sizes with the same name are equal.
            value.shape = ir.Shape(
                dim if isinstance(dim, int) or dim.value is None else pattern.sub(lambda f: names[f[0]], dim.value)
                for dim in value.shape
            )


def _convolution(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: Any = 1,
) -> Any:
    """Translate aten.conv2d, including grouped convolutions with per-sample kernels.

    A convolution with per-sample kernels has a number of groups proportional to the batch. ONNX's Conv has its number
    of groups as a constant attribute, so such a convolution becomes a Scan over the samples.
    """
    op: Any = importlib.import_module("onnxscript").opset18
    down, right = padding if len(padding) == 2 else (*padding, *padding)
    attributes: dict[str, Any] = {
        "strides": list(stride) * (3 - len(stride)),
        "dilations": list(dilation) * (3 - len(dilation)),
        "pads": [down, right, down, right],
    }
    if isinstance(groups, int):
        inputs = (x, weight) if bias is None else (x, weight, bias)
        return op.Conv(*inputs, group=groups, **attributes)
    c_in, c_out = _each(x.shape[1]), _each(weight.shape[0])
    c_group, *kernel = weight.shape[1:]
    if c_in is None or c_out is None or x.shape[0] != 1 or not all(isinstance(n, int) for n in (c_group, *kernel)):
        raise ValueError(f"a convolution with {groups} groups of {x.shape} is none with a kernel for every sample")
    space = op.Shape(x, start=2)
    inputs = (
        op.Reshape(x, op.Concat(op.Constant(value_ints=[-1, 1, c_in]), space, axis=0)),
        op.Reshape(weight, op.Constant(value_ints=[-1, c_out, c_group, *kernel])),
    )
    if bias is not None:
        inputs = (*inputs, op.Reshape(bias, op.Constant(value_ints=[-1, c_out])))
    body = _one_convolution(len(inputs), c_in // c_group, attributes)
    y = op.Scan(*inputs, body=body, num_scan_inputs=len(inputs))
    return op.Reshape(y, op.Concat(op.Constant(value_ints=[1, -1]), op.Shape(y, start=3), axis=0))


def _suppression(boxes: Any, scores: Any, iou_threshold: float, score_threshold: float) -> Any:
    """Translate ``widefield::nms_mask``: the places that ONNX's suppression returns are marked in zeros."""
    op: Any = importlib.import_module("onnxscript").opset18
    rows = op.Shape(boxes, start=1, end=2)
    limits = [op.Constant(value_floats=[value]) for value in (iou_threshold, score_threshold)]
    found = op.NonMaxSuppression(boxes, scores, rows, *limits)
    ones = op.Expand(op.Constant(value_float=1.0), op.Shape(found, end=1))
    zeros = op.Expand(op.Constant(value_float=0.0), op.Shape(scores))
    return op.Cast(op.ScatterND(zeros, found, ones), to=9)  # bool


def _one_convolution(inputs: int, groups: int, attributes: dict[str, Any]) -> Any:
    """Return the graph of one Conv of (1, C, H, W) with a kernel and an optional bias, all float32."""
    import onnx_ir as ir
    from onnx import TensorProto, helper

    names = ["x", "weight", "bias"][:inputs]
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (*names, "y")}
    node = helper.make_node("Conv", names, ["y"], group=groups, **attributes)
    graph = helper.make_graph([node], "one_sample", [values[name] for name in names], [values["y"]])
    return ir.serde.deserialize_graph(graph)


def _each(size: Any) -> int | None:
    """Return k for a size of k times the batch (torch writes 16*s77), or None for any other size."""
    found = re.fullmatch(r"(?:(\d+)\*)?[a-z]\w*", "" if isinstance(size, int) else str(size.value))
    return None if found is None else int(found[1] or 1)


def _adaptive_pooling(x: Any, output_size: Sequence[int]) -> Any:
    """Translate aten.adaptive_avg_pool2d for maps of any size, as a matrix product along each axis.

    torch's exporter chooses the windows at the example's size, and the graph would be right for that size only.
    """
    op: Any = importlib.import_module("onnxscript").opset18
    rows, columns = output_size if len(output_size) == 2 else (*output_size, *output_size)
    if rows == columns == 1:
        return op.ReduceMean(x, op.Constant(value_ints=[2, 3]), keepdims=1)
    return op.MatMul(op.MatMul(_windows(op, x, 2, rows), x), op.Transpose(_windows(op, x, 3, columns), perm=[1, 0]))


def _windows(op: Any, x: Any, axis: int, count: int) -> Any:
    """Return the weights of an axis' positions in each mean: (count, length), each row with a sum of 1.

    Window i is from floor(i * length / count) to ceil((i + 1) * length / count), as torch has it.
    """
    length = op.Shape(x, start=axis, end=axis + 1)
    number = op.Constant(value_ints=[count])
    first = op.Div(op.Mul(op.Constant(value_ints=list(range(count))), length), number)
    ends = op.Mul(op.Constant(value_ints=list(range(1, count + 1))), length)
    last = op.Div(op.Add(ends, op.Constant(value_ints=[count - 1])), number)
    places = op.Range(op.Constant(value_int=0), op.Squeeze(length), op.Constant(value_int=1))
    one = op.Constant(value_ints=[1])
    inside = op.And(op.GreaterOrEqual(places, op.Unsqueeze(first, one)), op.Less(places, op.Unsqueeze(last, one)))
    weights = op.Cast(inside, to=1)  # float32
    return op.Div(weights, op.ReduceSum(weights, one, keepdims=1))
