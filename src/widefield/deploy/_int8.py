"""ONNX graphs in 8 bits: their weights, onnxruntime's static quantization, and extra outputs for measurements."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from widefield.deploy import _graph
from widefield.deploy._others import first_line, quiet


class Weight(NamedTuple):
    """A constant that is convolved or multiplied with."""

    name: str
    """As :func:`widefield.deploy._graph.layer_name` has it."""
    shape: tuple[int, ...]
    values: Tensor
    """(output channels, numbers of each)."""


def weights(model: Any) -> list[Weight]:
    """Return the weights of a graph that :func:`quantize` would round."""
    return [weight for _, weight in _weights(model)]


def quantize(
    model: Any, out: Path, images: Iterable[Tensor], method: str, floating: Collection[str], *, seven_bits: bool
) -> None:
    """Write a graph in int8, ranges of activations read off images.

    A convolution's output is rounded, since onnxruntime computes convolutions of bytes only into bytes; where a Clip or
    Relu alone reads it, after that. Matrix products of bytes give float32, and their outputs stay as they are.

    Args:
        model: onnx.ModelProto.
        out: ONNX file.
        images: (N, C, H, W) each.
        method: of onnxruntime's CalibrationMethod.
        floating: names of weights whose nodes stay in float32.
        seven_bits: of weights, for processors whose products of bytes saturate.

    Raises:
        ValueError: onnxruntime cannot quantize it.
    """
    from onnxruntime import quantization

    kept = [node.name for node, weight in _weights(model) if weight.name in floating]
    routers = [node.name for node in model.graph.node if _graph.in_router(node)]
    try:
        with quiet():
            quantization.quantize_static(
                _graph.copied(model),
                out,
                _reader(images, model.graph.input[0].name),
                op_types_to_quantize=[*_graph.COMPUTED, *_graph.FOLDED],
                per_channel=True,
                nodes_to_exclude=kept + routers,
                activation_type=quantization.QuantType.QUInt8,  # signed ones take a slower way on x86
                weight_type=quantization.QuantType.QInt8,
                reduce_range=seven_bits,
                calibrate_method=quantization.CalibrationMethod[method],
                use_external_data_format=model.ByteSize() > _graph.LARGE,
                extra_options={"OpTypesToExcludeOutputQuantization": list(_graph.PRODUCTS)},
            )
    except Exception as error:  # onnxruntime's own, and assertions
        raise ValueError(f"onnxruntime cannot quantize this model: {first_line(error)}") from error


def drop_outputs(path: Path, names: Sequence[str]) -> None:
    """Leave a graph its first outputs alone, under these names."""
    model = _graph.read(path)
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
    _graph.write(model, path)


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
    constants = _graph.constants(model)
    for node in _graph.weighted(model):
        values = torch.from_numpy(_graph.values(constants[node.input[1]]))
        flat = values.flatten(1) if _graph.transposed(node) else values.flatten(0, -2).T
        yield node, Weight(_graph.layer_name(node), tuple(values.shape), flat)
