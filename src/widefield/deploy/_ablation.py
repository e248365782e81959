"""Measure the effect of rounding each layer: a float32 graph in which single layers can run in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widefield.deploy import _balance, _graph

_SWITCHES = "rounded"
_ON_OUTPUT = "_QuantizeLinear_Input"
"""Suffix that onnxruntime gives an output of the graph before rounding."""


@dataclass
class Layer:
    """The rounded parts of one layer: its weights, its output, or both."""

    name: str
    """From :func:`widefield.deploy._graph.layer_name`; the graph's input has its own name."""
    operator: str
    span: tuple[float, float] | None = None
    """Smallest and largest possible value of the rounded output; None where the output is not rounded."""
    output: tuple[str, np.ndarray, np.ndarray] | None = None
    """Tensor name, scale and zero point of the rounded output."""
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    """Name -> 8-bit values of weights and bias, dequantized, after bias correction."""


class Ablation:
    """A float32 graph in which the rounding of an int8 graph can be switched on, layer by layer."""

    def __init__(self, plain: Any, rounded: Any) -> None:
        """Build the graph from two onnx.ModelProto: ``plain`` and its int8 version, ``rounded``."""
        self.layers = tuple(_layers(plain, rounded))
        self._input = plain.graph.input[0].name
        # Not optimized: onnxruntime would fuse the rounding nodes and compute in integers.
        self._session = _graph.session(_switched(plain, self.layers), optimized=False)

    def __call__(self, images: Tensor, on: Sequence[int]) -> list[Tensor]:
        """Return the outputs with the layers at these indices in 8 bits and all others in float32."""
        switches = np.zeros(len(self.layers), bool)
        switches[list(on)] = True
        found = self._session.run(None, {self._input: images.numpy(), _SWITCHES: switches})
        return [torch.from_numpy(output) for output in found]


def _layers(plain: Any, rounded: Any) -> list[Layer]:
    """Return the rounded layers in graph order."""
    made, known = _graph.producers(plain), _graph.constants(rounded)
    found: dict[str, Layer] = {}
    weights = _balance.weights_of(rounded)
    for node in plain.graph.node:
        if node.op_type in _graph.COMPUTED and node.input[1] in weights:
            layer = found.setdefault(node.output[0], Layer(_graph.layer_name(node), node.op_type))
            layer.constants[node.input[1]] = weights[node.input[1]]
            before, after = (_balance.bias_of(model, node.name) for model in (plain, rounded))
            if before is not None and after is not None:
                layer.constants[before[0].name] = (_graph.values(after[0]) * after[1]).astype(np.float32)
    for node in rounded.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        tensor = node.input[0].removesuffix(_ON_OUTPUT)
        source = _source(tensor, made)
        if source is None:
            layer = found.setdefault(tensor, Layer(tensor, "input"))
        else:
            layer = found.setdefault(source.output[0], Layer(_graph.layer_name(source), source.op_type))
        scale, zero = (_graph.values(known[name]) for name in node.input[1:])
        ends = np.iinfo(zero.dtype)
        low, high = ((end - float(zero)) * float(scale) for end in (ends.min, ends.max))
        layer.span, layer.output = (low, high), (tensor, scale, zero)
    order = {name: place for place, name in enumerate(made)}
    return [found[name] for name in sorted(found, key=lambda name: order.get(name, -1))]


def _source(tensor: str, made: Any) -> Any:
    """Return the node that computes a tensor, skipping nodes that only clip it; None for the graph's input."""
    node = made.get(tensor)
    while node is not None and node.op_type in _graph.FOLDED and node.input[0] in made:
        node = made[node.input[0]]
    return node


def _switched(plain: Any, layers: Sequence[Layer]) -> Any:
    """Return a graph with an additional input: one switch per layer, (layers,) bool."""
    from onnx import TensorProto, helper

    model = _graph.copied(plain)
    graph = model.graph
    graph.input.append(helper.make_tensor_value_info(_SWITCHES, TensorProto.BOOL, [len(layers)]))
    made, outputs = _graph.producers(plain), {output.name for output in graph.output}
    first, after = [], {}
    for index, layer in enumerate(layers):
        switch = f"{_SWITCHES}_{index}"
        place = _graph.add_constant(model, f"{switch}_place", np.array(index, np.int64))
        first.append(helper.make_node("Gather", [_SWITCHES, place], [switch]))
        for name, values in layer.constants.items():
            other = _graph.add_constant(model, f"{name}_{switch}", values)
            after[name] = [helper.make_node("Where", [switch, other, name], [f"{name}_{_SWITCHES}"])]
        if layer.output is not None:
            after[layer.output[0]] = list(_rounding(model, *layer.output, switch))
    first += [node for name, added in after.items() if name not in made for node in added]
    nodes = []
    for node in graph.node:
        node.input[:] = [f"{name}_{_SWITCHES}" if name in after else name for name in node.input]
        nodes += [node, *(added for name in node.output for added in after.get(name, []))]
    for node in nodes:  # a rounded output of the graph must keep its name
        for names in (node.input, node.output):
            names[:] = [_kept(name, outputs & after.keys()) for name in names]
    del graph.node[:]
    graph.node.extend([*first, *nodes])
    return model


def _rounding(model: Any, tensor: str, scale: np.ndarray, zero: np.ndarray, switch: str) -> Iterator[Any]:
    from onnx import helper

    stem = f"{tensor}_{_SWITCHES}"
    step = [_graph.add_constant(model, f"{stem}_scale", scale), _graph.add_constant(model, f"{stem}_zero", zero)]
    yield helper.make_node("QuantizeLinear", [tensor, *step], [f"{stem}_bytes"])
    yield helper.make_node("DequantizeLinear", [f"{stem}_bytes", *step], [f"{stem}_read"])
    yield helper.make_node("Where", [switch, f"{stem}_read", tensor], [stem])


def _kept(name: str, outputs: set[str]) -> str:
    """Swap the names of a graph output before and after rounding, and keep any other name."""
    rounded = name.removesuffix(f"_{_SWITCHES}")
    if name in outputs:
        return f"{name}_{_SWITCHES}_not"
    return rounded if rounded != name and rounded in outputs else name
