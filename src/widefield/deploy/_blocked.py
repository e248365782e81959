"""Rewrite convolutions with per-sample kernels for the blocked layout of onnxruntime's CPU kernels.

onnxruntime has fast depthwise kernels for maps whose channels are split into blocks of as many as a vector register
holds (NCHWc). It moves convolutions with constant kernels there, and computes all others by matrix products with the
taps of each pixel, about seven times as slow. The operators that it inserts may stand in a file, too (domain
``com.microsoft.nchwc``). They read the size of a block from the processor, so the file fits every processor that has
such kernels.

Depthwise kernels (C, 1, KH, KW) are stored in blocks as maps (1, C, KH, KW) are. The operator that moves maps therefore
moves kernels that were mixed at run time as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

DOMAIN = "com.microsoft.nchwc"

_BLOCK = 16
"""Channels of the largest block. Smaller ones divide it."""


def to_blocked(model: Any) -> int:
    """Rewrite depthwise convolutions with computed kernels in an onnx_ir.Model; return how many there are."""
    count = 0
    for node in list(model.graph):
        if node.op_type == "Scan":
            count += _in_loop(model.graph, node)
        elif _is_computed(node):
            groups = node.attributes["group"].as_int()
            size = [int(side) for side in node.inputs[1].shape[2:]]
            kernels = _kernels(model.graph, node, node.inputs[1], [1, groups, *size], [groups, 1, *size])
            node.replace_input_with(1, kernels)
            _surround(model.graph, node, groups, size)
            count += 1
    if count:
        model.graph.opset_imports[DOMAIN] = 1
    return count


def _in_loop(graph: Any, scan: Any) -> bool:
    """Rewrite a loop over samples that :func:`widefield.deploy._onnx.to_onnx` made; return whether it is depthwise."""
    body = scan.attributes["body"].as_graph()
    convolutions = list(body)
    if len(convolutions) != 1 or convolutions[0].op_type != "Conv":
        return False
    conv, reshaped = convolutions[0], scan.inputs[1]
    if reshaped.shape is None or len(reshaped.shape) != 5:
        return False
    if not all(isinstance(n, int) for n in reshaped.shape[1:]):
        return False
    channels, per_group, *size = (int(n) for n in reshaped.shape[1:])
    if per_group != 1 or not _fits(conv, channels):
        return False
    mixed = reshaped.producer().inputs[0]
    kernels = _kernels(graph, scan, mixed, [-1, channels, *size], [-1, channels, 1, *size])
    scan.replace_input_with(1, kernels)
    _surround(body, conv, channels, size)
    return True


def _is_computed(node: Any) -> bool:
    """Return whether a node is a depthwise convolution of one image with kernels that are not constants."""
    if (
        node.op_type != "Conv"
        or node.domain
        or node.inputs[1].is_initializer()
        or node.inputs[1].const_value is not None
    ):
        return False
    image, kernel = node.inputs[0].shape, node.inputs[1].shape
    if image is None or kernel is None or image[0] != 1 or not all(isinstance(n, int) for n in kernel):
        return False
    return kernel[1] == 1 and _fits(node, int(kernel[0]))


def _fits(conv: Any, channels: int) -> bool:
    return bool(conv.attributes["group"].as_int() == channels and channels % _BLOCK == 0)


def _kernels(graph: Any, before: Any, mixed: Any, maps: Sequence[int], last: Sequence[int]) -> Any:
    """Insert nodes that move kernels into blocks as if they were maps of shape ``maps``; return them as ``last``."""
    nodes = list(_moved(mixed, maps, last))
    for node in nodes:
        graph.insert_before(before, node)
    return nodes[-1].outputs[0]


def _moved(mixed: Any, maps: Sequence[int], last: Sequence[int]) -> Iterator[Any]:
    import onnx_ir as ir

    for shape in (maps, last):
        size = ir.node("Constant", [], {"value_ints": list(shape)})
        yield size
        reshaped = ir.node("Reshape", [mixed, size.outputs[0]])
        yield reshaped
        mixed = reshaped.outputs[0]
        if shape is maps:
            blocked = ir.node("ReorderInput", [mixed], domain=DOMAIN)
            yield blocked
            mixed = blocked.outputs[0]


def _surround(graph: Any, conv: Any, channels: int, size: Sequence[int]) -> None:
    """Turn a convolution into one of blocks, with the reorderings before and after it."""
    import onnx_ir as ir

    result = conv.outputs[0]
    enter = ir.node("ReorderInput", [conv.inputs[0]], domain=DOMAIN)
    enter.outputs[0].name = f"{result.name}_in_blocks"  # a loop does not see which names are taken outside of it
    graph.insert_before(conv, enter)
    conv.replace_input_with(0, enter.outputs[0])
    conv.domain = DOMAIN
    conv.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", list(size))
    leave = ir.node("ReorderOutput", [result], {"channels": channels}, domain=DOMAIN)
    leave.outputs[0].name = f"{result.name}_of_blocks"
    graph.insert_after(conv, leave)
    result.replace_all_uses_with(leave.outputs[0], replace_graph_outputs=True)
    leave.replace_input_with(0, result)
