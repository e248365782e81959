"""ONNX graphs in 8 bits: which weights there are, onnxruntime's static quantisation, and outputs put in to measure."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from widefield.deploy._others import first_line, quiet

OPERATORS = ("Conv", "Gemm", "MatMul")
"""What computes in int8."""


_LARGE = 1 << 30
"""Bytes of a graph from which its weights go into a file of their own: a protobuf holds twice that at most."""


class Weight(NamedTuple):
    """A constant that is convolved or multiplied with."""

    name: str
    """As the model's state has it, less ".weight"; or that of the layer that it was called in; or of the node."""
    shape: tuple[int, ...]
    values: Tensor
    """(output channels, numbers of each)."""


def weights(path: Path) -> list[Weight]:
    """Return the weights of a graph that :func:`quantize` would round."""
    return [weight for _, weight in _weights(_read(path))]


def quantize(
    path: Path, out: Path, images: Iterable[Tensor], method: str, floating: Collection[str], *, seven_bits: bool
) -> None:
    """Write a graph in int8, ranges of activations read off images.

    Args:
        path, out: ONNX.
        images: (N, C, H, W) each.
        method: of onnxruntime's CalibrationMethod.
        floating: names of weights whose nodes stay in float32.
        seven_bits: of weights, for processors whose products of bytes saturate.

    Raises:
        ValueError: onnxruntime cannot quantise it.
    """
    from onnxruntime import quantization

    model = _read(path)
    kept = [node.name for node, weight in _weights(model) if weight.name in floating]
    routers = [node.name for node in model.graph.node if _in_router(node)]
    try:
        with quiet():
            quantization.quantize_static(
                model,
                out,
                _reader(images, model.graph.input[0].name),
                op_types_to_quantize=list(OPERATORS),
                per_channel=True,
                nodes_to_exclude=kept + routers,
                activation_type=quantization.QuantType.QUInt8,  # signed ones take a slower way on x86
                weight_type=quantization.QuantType.QInt8,
                reduce_range=seven_bits,
                calibrate_method=quantization.CalibrationMethod[method],
                use_external_data_format=path.stat().st_size > _LARGE or bool(list(path.parent.glob("*.data"))),
            )
    except Exception as error:  # onnxruntime's own, and assertions
        raise ValueError(f"onnxruntime cannot quantise this model: {first_line(error)}") from error


def drop_outputs(path: Path, names: Sequence[str]) -> None:
    """Leave a graph its first outputs alone, under these names."""
    import onnx

    model = onnx.load(path)
    large = bool(list(path.parent.glob("*.data")))
    graph = model.graph
    del graph.output[len(names) :]
    taken = {tensor.name for tensor in graph.initializer} | {name for node in graph.node for name in node.output}
    for output, name in zip(graph.output, names, strict=True):
        old = output.name
        if name in taken:
            continue  # the name of something inside
        output.name = name
        for node in graph.node:
            node.output[:] = [name if word == old else word for word in node.output]
            node.input[:] = [name if word == old else word for word in node.input]
    onnx.save(model, path, save_as_external_data=large, location=f"{path.name}.data")


def _read(path: Path) -> Any:
    import onnx

    return onnx.load(path)


def _reader(images: Iterable[Tensor], name: str) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            # One by one: a last batch that is smaller would make results that onnxruntime cannot stack.
            self._left = (image for batch in images for image in batch.split(1))

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self._left, None)
            return None if image is None else {name: image.numpy()}

    return Reader()


def _weights(model: Any) -> Iterator[tuple[Any, Weight]]:
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in OPERATORS or node.input[1] not in constants or _in_router(node):
            continue
        values = torch.from_numpy(numpy_helper.to_array(constants[node.input[1]]).copy())
        by_row = node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
        flat = values.flatten(1) if by_row else values.flatten(0, -2).T
        yield node, Weight(_name(node, node.input[1]), tuple(values.shape), flat)


def _scopes(node: Any) -> list[str]:
    """Return the modules that a node was called in, outermost first, as torch's exporter notes them."""
    noted = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
    return [str(scope) for scope in ast.literal_eval(noted)]


def _in_router(node: Any) -> bool:
    return any(scope.endswith((".router", ".predictor")) for scope in _scopes(node))


def _name(node: Any, constant: str) -> str:
    if constant.startswith("model."):
        return constant.removeprefix("model.").removesuffix(".weight")
    modules = [scope for scope in _scopes(node)[:-1] if scope]  # the last is the node itself
    layer = modules[-1].removeprefix("model").lstrip(".") if modules else ""
    return layer or re.sub(r"^node_", "", node.name)
