"""Quantize ONNX graphs to 8 bits with onnxruntime, list their weights and remove their extra outputs."""

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
    """A constant weight of a convolution or matrix product."""

    name: str
    """Its layer, from :func:`widefield.deploy._graph.layer_name`."""
    shape: tuple[int, ...]
    values: Tensor
    """(output channels, values per channel)."""


def weights(model: Any) -> list[Weight]:
    """Return the weights of a graph that :func:`quantize` would round, each once, however many nodes read it."""
    return list({node.input[1]: weight for node, weight in _weights(model)}.values())


def quantize(
    model: Any, out: Path, images: Iterable[Tensor], method: str, floating: Collection[str], *, seven_bits: bool
) -> None:
    """Write a graph in int8, with activation ranges measured on images.

    Outputs of convolutions are rounded, since onnxruntime's 8-bit convolutions have 8-bit outputs. Where a Clip or Relu
    is the only reader, its output is rounded instead. 8-bit matrix products return float32; their outputs are not
    rounded.

    Args:
        model: onnx.ModelProto.
        out: ONNX file.
        images: (N, C, H, W) each.
        method: name of a member of onnxruntime's CalibrationMethod.
        floating: names of weights whose nodes stay in float32.
        seven_bits: round weights to 7 bits, for processors whose 8-bit products saturate.

    Raises:
        ValueError: onnxruntime cannot quantize the graph.
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
                activation_type=quantization.QuantType.QUInt8,  # signed activations are slower on x86
                weight_type=quantization.QuantType.QInt8,
                reduce_range=seven_bits,
                calibrate_method=quantization.CalibrationMethod[method],
                use_external_data_format=model.ByteSize() > _graph.LARGE,
                extra_options={"OpTypesToExcludeOutputQuantization": list(_graph.PRODUCTS)},
            )
    except Exception as error:  # onnxruntime raises its own errors and AssertionError
        raise ValueError(f"onnxruntime cannot quantize this model: {first_line(error)}") from error


def drop_outputs(path: Path, names: Sequence[str]) -> None:
    """Keep only a graph's first ``len(names)`` outputs and rename them, in place."""
    model = _graph.read(path)
    graph = model.graph
    del graph.output[len(names) :]
    taken = {tensor.name for tensor in graph.initializer} | {name for node in graph.node for name in node.output}
    for output, name in zip(graph.output, names, strict=True):
        old = output.name
        if name in taken:
            continue  # a weight or an intermediate tensor has the name
        output.name = name
        for node in graph.node:
            node.output[:] = [name if word == old else word for word in node.output]
            node.input[:] = [name if word == old else word for word in node.input]
    _graph.write(model, path)


def _reader(images: Iterable[Tensor], name: str) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            # One image at a time: onnxruntime cannot stack the results of a smaller last batch.
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
