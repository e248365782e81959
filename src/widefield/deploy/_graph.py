"""Read, write and run ONNX graphs, and measure their intermediate tensors."""

from __future__ import annotations

import ast
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 30
"""Bytes of a graph above which its weights go into a separate file. A protobuf holds at most twice as much."""

PRODUCTS = ("Gemm", "MatMul")
COMPUTED = ("Conv", *PRODUCTS)
"""Operators that can multiply 8-bit numbers; their second input holds the weights."""

FOLDED = ("Clip", "Relu")
"""Operators that only clip a convolution's output. Rounding clips too, at the ends of its range."""


def read(path: Path) -> Any:
    """Return the onnx.ModelProto of a file, weights included."""
    import onnx

    return onnx.load(path)


def write(model: Any, path: Path) -> None:
    """Write a graph, replacing existing files; the weights of a large graph go into a separate file next to it."""
    import onnx

    beside = f"{path.name}.data"
    path.with_name(beside).unlink(missing_ok=True)
    if model.ByteSize() > LARGE:
        onnx.save(model, path, save_as_external_data=True, location=beside)
    else:
        onnx.save(model, path)


def annotate(path: Path, texts: Mapping[str, str]) -> None:
    """Set the metadata of a graph's file."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(model, dict(texts))
    onnx.save(model, path)


def copied(model: Any) -> Any:
    """Return a copy of a ModelProto."""
    twin = type(model)()
    twin.CopyFrom(model)
    return twin


def constants(model: Any) -> dict[str, Any]:
    """Return name -> TensorProto of a graph's constants."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def values(tensor: Any) -> np.ndarray:
    """Return the values of a TensorProto."""
    from onnx import numpy_helper

    return np.array(numpy_helper.to_array(tensor))


def store(tensor: Any, numbers: np.ndarray) -> None:
    """Replace the values of a TensorProto, keeping its dtype."""
    from onnx import numpy_helper

    tensor.CopyFrom(numpy_helper.from_array(numbers.astype(values(tensor).dtype), tensor.name))


def add_constant(model: Any, name: str, numbers: np.ndarray) -> str:
    """Add a constant to a graph; return its name."""
    from onnx import numpy_helper

    model.graph.initializer.append(numpy_helper.from_array(np.asarray(numbers), name))
    return name


def producers(model: Any) -> dict[str, Any]:
    """Return tensor -> the node that computes it."""
    return {name: node for node in model.graph.node for name in node.output}


def readers(model: Any) -> dict[str, list[Any]]:
    """Return tensor -> the nodes that read it."""
    found: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in dict.fromkeys(node.input):
            found.setdefault(name, []).append(node)
    return found


def weighted(model: Any) -> Iterator[Any]:
    """Yield the nodes that compute with constant weights, except those in routers."""
    known = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in COMPUTED and node.input[1] in known and not in_router(node):
            yield node


def own_weights(model: Any) -> Iterator[Any]:
    """Yield the nodes of :func:`weighted` whose weights and bias no other node reads."""
    uses = Counter(name for node in model.graph.node for name in node.input)
    for node in weighted(model):
        if all(uses[name] == 1 for name in node.input[1:] if name):
            yield node


def scopes(node: Any) -> list[str]:
    """Return the modules that a node was called in, outermost first, from the metadata of torch's exporter."""
    noted = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
    return [str(scope) for scope in ast.literal_eval(noted)]


def in_router(node: Any) -> bool:
    """Return whether a node is part of a router, which selects or weights kernels."""
    return any(scope.endswith((".router", ".predictor")) for scope in scopes(node))


def layer_name(node: Any) -> str:
    """Return the layer of a node: the module that owns its weights, else the module that calls it, else its name."""
    constant = node.input[1] if node.op_type in COMPUTED else ""
    if constant.startswith("model."):
        return str(constant.removeprefix("model.").removesuffix(".weight"))
    modules = [scope for scope in scopes(node)[:-1] if scope]  # the last is the node itself
    layer = modules[-1].removeprefix("model").lstrip(".") if modules else ""
    return layer or re.sub(r"^node_", "", node.name)


def session(model: Any, *, optimized: bool = True) -> Any:
    """Return an onnxruntime.InferenceSession of a graph, with PyTorch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        write(model, path)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def observe(
    model: Any, tensors: Mapping[str, int | None], images: Iterable[Tensor], operator: str
) -> dict[str, np.ndarray]:
    """Run a graph and reduce intermediate tensors to one number per channel, over all images and positions.

    Args:
        model: onnx.ModelProto; not modified.
        tensors: name of an intermediate tensor -> its number of channels where they are the last axis, or None for a
            feature map, (N, C, H, W).
        images: (N, C, H, W) each.
        operator: "ReduceMean", or "ReduceMax" of the absolute values.

    Returns:
        tensor -> (channels,).
    """
    from onnx import TensorProto, helper

    twin = copied(model)
    del twin.graph.output[:]
    for tensor, channels in tensors.items():
        shape, axes = ([0, 0, -1], [0, 2]) if channels is None else ([-1, channels], [0])
        target = add_constant(twin, f"{tensor}_observed_shape", np.array(shape, np.int64))
        over = add_constant(twin, f"{tensor}_observed_axes", np.array(axes, np.int64))
        flat, found = f"{tensor}_observed_flat", f"{tensor}_observed"
        twin.graph.node.append(helper.make_node("Reshape", [tensor, target], [flat]))
        if operator == "ReduceMax":
            twin.graph.node.append(helper.make_node("Abs", [flat], [f"{flat}_abs"]))
            flat = f"{flat}_abs"
        twin.graph.node.append(helper.make_node(operator, [flat, over], [found], keepdims=0))
        twin.graph.output.append(helper.make_tensor_value_info(found, TensorProto.FLOAT, None))
    if not tensors:
        return {}
    run, feed = session(twin), model.graph.input[0].name
    batches = [(len(x), run.run(None, {feed: x.numpy()})) for x in images]
    counts = [count for count, _ in batches]
    stacked = [np.stack(parts) for parts in zip(*(found for _, found in batches), strict=True)]
    merged = [part.max(0) if operator == "ReduceMax" else np.average(part, 0, counts) for part in stacked]
    return dict(zip(tensors, merged, strict=True))


def transposed(node: Any) -> bool:
    """Return whether the rows of a node's weights are its output channels."""
    return node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
