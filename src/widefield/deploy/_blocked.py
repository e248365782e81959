"""Rewrite convolutions with per-sample kernels for the blocked layout of onnxruntime's CPU kernels.

onnxruntime has fast depthwise kernels for maps whose channels are split into blocks of as many as a vector register
holds (NCHWc). It moves convolutions with constant kernels there, and computes all others by matrix products with the
taps of each pixel, about seven times as slow. The operators that it inserts may stand in a file, too (domain
``com.microsoft.nchwc``). They read the size of a block from the processor, so the file fits every processor that has
such kernels. The operator that moves maps out of blocks can write them with channels last, as the linear layers after
many large kernels read them; it then replaces a transposition.

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
            transposition = _to_channels_last(node.outputs[0])
            maps = _surround(model.graph, node, groups, size, transposition is not None)
            if transposition is not None:
                _replace(transposition, maps)
            count += 1
    if count:
        from onnx_ir.passes.common import RemoveUnusedNodesPass

        model.graph.opset_imports[DOMAIN] = 1
        RemoveUnusedNodesPass()(model)  # transpositions whose work the reordering does
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
    joined = _only_reader(scan.outputs[0], "Reshape")  # (N, 1, C, H, W) to (N, C, H, W)
    transposition = None if joined is None else _to_channels_last(joined.outputs[0])
    _surround(body, conv, channels, size, transposition is not None)
    if transposition is not None:
        import onnx_ir as ir

        axis = ir.node("Constant", [], {"value_ints": [1]})
        squeezed = ir.node("Squeeze", [scan.outputs[0], axis.outputs[0]])
        for node in (axis, squeezed):
            graph.insert_before(transposition, node)
        _replace(transposition, squeezed.outputs[0])
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


def _only_reader(value: Any, operator: str) -> Any | None:
    """Return the node that reads a value, if it is the only one and of this operator."""
    readers = value.consumers()
    only = len(readers) == 1 and not value.is_graph_output() and readers[0].op_type == operator
    return readers[0] if only else None


def _to_channels_last(value: Any) -> Any | None:
    """Return the transposition from (N, C, H, W) to (N, H, W, C), if nothing else reads these maps."""
    found = _only_reader(value, "Transpose")
    if found is None or list(found.attributes["perm"].as_ints()) != [0, 2, 3, 1]:
        return None
    return None if found.outputs[0].is_graph_output() else found


def _replace(node: Any, value: Any) -> None:
    """Let all readers of a node's output read another value."""
    value.shape, value.type = node.outputs[0].shape, node.outputs[0].type
    node.outputs[0].replace_all_uses_with(value)


def _surround(graph: Any, conv: Any, channels: int, size: Sequence[int], channels_last: bool) -> Any:
    """Turn a convolution into one of blocks, with reorderings before and after it; return the reordered result."""
    import onnx_ir as ir

    result = conv.outputs[0]
    enter = ir.node("ReorderInput", [conv.inputs[0]], domain=DOMAIN)
    enter.outputs[0].name = f"{result.name}_in_blocks"  # a loop does not see which names are taken outside of it
    graph.insert_before(conv, enter)
    conv.replace_input_with(0, enter.outputs[0])
    conv.domain = DOMAIN
    conv.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", list(size))
    attributes = {"channels": channels, "channels_last": int(channels_last)}
    leave = ir.node("ReorderOutput", [result], attributes, domain=DOMAIN)
    leave.outputs[0].name = f"{result.name}_of_blocks"
    graph.insert_after(conv, leave)
    result.replace_all_uses_with(leave.outputs[0], replace_graph_outputs=True)
    leave.replace_input_with(0, result)
    return leave.outputs[0]
