"""Prepare graphs for rounding without changing their function, and correct the bias of rounded graphs.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019: channels of different
magnitude share one rounding step (section 4.1), and the mean error of rounded weights adds to every output (section
4.2). Both are measured on calibration images here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from widefield.deploy import _graph

_HEADROOM = 2.0
"""Channels are stretched to half of their tensor's range, as other images may have larger values."""
_MOST = 64.0
"""Largest factor; a channel that needs more is almost zero."""
_DEAD = 1e-6
"""Share of a tensor's range below which a channel counts as zero on these images."""

_SATURATED = {"Gelu": (-4.0, None), "Mish": (-10.0, None), "HardSwish": (-3.0, None)}
"""Activation -> range of its input; outside it, the output changes by less than half an 8-bit step."""
_GATES = {"Sigmoid": (-7.0, 7.0), "Tanh": (-3.2, 3.2)}
"""The same, valid only if the readers of the activation do not magnify its ends, as a logarithm would."""
_SILU = (-10.0, None)

_Ends = tuple[float | None, float | None]


def prepare(model: Any) -> None:
    """Prepare a float32 graph for rounding, in place: add missing biases and clip ranges."""
    _give_biases(model)
    _cut(model)


def correct(plain: Any, rounded: Any, images: Iterable[Tensor]) -> None:
    """Subtract the mean error of rounded weights from the biases of ``rounded``, in place.

    Args:
        plain: the float32 graph.
        rounded: made from it by :func:`widefield.deploy._int8.quantize`.
        images: over which the mean is taken.
    """
    from onnx import helper

    twin, before = _graph.copied(plain), _graph.constants(plain)
    after = weights_of(rounded)
    owners: list[Any] = []
    tensors: dict[str, int | None] = {}
    for node in _graph.own_weights(plain):
        name = node.input[1]
        if name not in after or bias_of(rounded, node.name) is None:
            continue
        lost = _graph.add_constant(twin, f"{name}_lost", _graph.values(before[name]) - after[name])
        probe = helper.make_node(node.op_type, [node.input[0], lost], [f"{node.output[0]}_lost"])
        probe.attribute.extend(node.attribute)
        twin.graph.node.append(probe)
        tensors[probe.output[0]] = None if node.op_type == "Conv" else _channels(node, before)
        owners.append(node)
    shifts = _graph.observe(twin, tensors, images, "ReduceMean")
    for node, shift in zip(owners, shifts.values(), strict=True):
        _shift(rounded, node.name, shift)


def weights_of(rounded: Any) -> dict[str, np.ndarray]:
    """Return name -> dequantized values of every rounded weight."""
    known, found = _graph.constants(rounded), {}
    for node in rounded.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in known:
            numbers = _graph.values(known[node.input[0]])
            if numbers.dtype != np.int32:
                found[node.input[0].removesuffix("_quantized")] = _dequantized(node, known)
    return found


def bias_of(model: Any, name: str) -> tuple[Any, float | np.ndarray] | None:
    """Return the bias constant of a node and its rounding step, or None if it has no bias of its own.

    Args:
        model: float32 or rounded graph.
        name: of the node.
    """
    known, made, read = _graph.constants(model), _graph.producers(model), _graph.readers(model)
    node = next(node for node in model.graph.node if node.name == name)
    if node.op_type == "MatMul":
        users = read.get(node.output[0], [])
        if len(users) != 1 or users[0].op_type != "Add":
            return None
        bias = next((word for word in users[0].input if word in known and len(known[word].dims) == 1), "")
    else:
        bias = node.input[2] if len(node.input) > 2 else ""
    scale: float | np.ndarray = 1.0
    if bias in made and made[bias].op_type == "DequantizeLinear":
        dequantize = made[bias]
        bias, scale = dequantize.input[0], _graph.values(known[dequantize.input[1]])
    if bias not in known or len(read[bias]) != 1:
        return None
    return known[bias], scale


def _shift(model: Any, name: str, by: np.ndarray) -> None:
    found = bias_of(model, name)
    if found is not None:
        bias, scale = found
        numbers = _graph.values(bias)
        step = np.round(by / scale) if numbers.dtype == np.int32 else by
        _graph.store(bias, numbers + step)


def _dequantized(node: Any, known: Any) -> np.ndarray:
    numbers, scale, zero = (_graph.values(known[name]) for name in node.input)
    if scale.ndim:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        shape = [-1 if place == axis % numbers.ndim else 1 for place in range(numbers.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return np.asarray((numbers.astype(np.float32) - zero.astype(np.float32)) * scale)


def _give_biases(model: Any) -> None:
    """Add zero biases to convolutions and Gemms without one."""
    known = _graph.constants(model)
    for node in _graph.weighted(model):
        if node.op_type in ("Conv", "Gemm") and (len(node.input) < 3 or not node.input[2]):
            zeros = np.zeros(_channels(node, known), np.float32)
            bias = _graph.add_constant(model, f"{node.output[0]}_bias", zeros)
            node.input[:] = [*node.input[:2], bias]


def _channels(node: Any, known: Any) -> int:
    """Return the number of output channels of a node with weights."""
    return int(known[node.input[1]].dims[0 if _graph.transposed(node) else -1])


def _cut(model: Any) -> None:
    """Clip tensors to the range outside which all readers saturate, so that no rounding steps are wasted."""
    from onnx import helper

    made, read = _graph.producers(model), _graph.readers(model)
    outputs = {output.name for output in model.graph.output}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        tensor = node.output[0] if node.output else ""
        ends = None if node.op_type != "Conv" or tensor in outputs else _ends(tensor, read, made)
        if ends is None:
            continue
        bounds = [
            "" if end is None else _graph.add_constant(model, f"{tensor}_cut_{side}", np.array(end, np.float32))
            for side, end in zip(("low", "high"), ends, strict=True)
        ]
        for reader in read[tensor]:
            reader.input[:] = [f"{tensor}_cut" if word == tensor else word for word in reader.input]
        nodes.append(helper.make_node("Clip", [tensor, *bounds], [f"{tensor}_cut"], name=f"{node.name}_cut"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _ends(tensor: str, read: Any, made: Any) -> _Ends | None:
    """Return the range outside which all readers of a tensor saturate, or None."""
    users = read.get(tensor, [])
    kinds = sorted(node.op_type for node in users)
    if kinds == ["Mul", "Sigmoid"]:
        times = next(node for node in users if node.op_type == "Mul")
        other = next((word for word in times.input if word != tensor), "")
        return _SILU if other in made and made[other] in users else None
    if len(kinds) == 1 and kinds[0] in _GATES:
        behind = read.get(users[0].output[0], [])
        return _GATES[kinds[0]] if all(node.op_type in ("Mul", *_graph.COMPUTED) for node in behind) else None
    if kinds == ["HardSigmoid"]:
        given = {a.name: a.f for a in users[0].attribute}
        alpha, beta = given.get("alpha", 0.2), given.get("beta", 0.5)
        return (-beta / alpha, (1 - beta) / alpha) if alpha > 0 else None
    return _SATURATED.get(kinds[0]) if len(kinds) == 1 else None


def equalize(model: Any, images: Iterable[Tensor]) -> None:
    """Scale the channels between two convolutions to similar magnitudes, in place, after :func:`prepare`.

    The graph computes the same function, with one exception. A Clip between the two convolutions keeps its bounds, so
    it cuts off values more than twice as large as on any of these images.
    """
    known, pairs = _graph.constants(model), _pairs(model)
    peaks = _graph.observe(model, {second.input[0]: None for *_, second in pairs}, images, "ReduceMax")
    for first, clipped, second in pairs:
        weight = _graph.values(known[second.input[1]])
        depthwise = weight.shape[1] == 1
        factor = _factor(peaks[second.input[0]], weight, depthwise, only_up=clipped)
        ones = [1] * (weight.ndim - 2)
        for name, shape in ((first.input[1], (-1, 1, *ones)), (first.input[2], (-1,))):
            _graph.store(known[name], _graph.values(known[name]) * factor.reshape(shape))
        shape = (-1, 1, *ones) if depthwise else (1, -1, *ones)
        _graph.store(known[second.input[1]], weight / factor.reshape(shape))


def _factor(peak: np.ndarray, weight: np.ndarray, depthwise: bool, *, only_up: bool) -> np.ndarray:
    """Return a factor for each channel between two convolutions.

    Args:
        peak: (channels,), largest absolute value of each.
        weight: of the convolution that reads the channels.
        depthwise: whether that convolution is depthwise, so that each kernel has its own rounding step. Otherwise,
            shrinking a channel enlarges its weights; the square root balances the two (equation 12).
        only_up: no factor below 1.

    Returns:
        (channels,).
    """
    largest, alive = peak.max(), peak > _DEAD * peak.max()
    if not alive.any():
        return np.ones_like(peak)
    safe = np.where(alive, peak, largest)
    if depthwise:
        factor = largest / safe
    else:
        axes = tuple(range(2, weight.ndim))
        taps = np.abs(weight).max(axes)  # (out, in)
        reach = (taps / np.maximum(taps.max(1, keepdims=True), 1e-30)).max(0)
        factor = np.sqrt(np.maximum(reach, 1e-6) / safe)
        factor *= largest / (safe * factor).max()
    factor = np.minimum(factor, np.maximum(1.0, largest / (_HEADROOM * safe)))
    factor = np.clip(factor, 1.0 if only_up else 1 / _MOST, _MOST)
    return np.where(alive, factor, 1.0)


def _pairs(model: Any) -> list[tuple[Any, bool, Any]]:
    """Return (convolution, whether a Clip follows, next convolution) for each pair whose link has no other reader."""
    known, read = _graph.constants(model), _graph.readers(model)
    outputs = {output.name for output in model.graph.output}
    own = {node.name for node in _graph.own_weights(model) if node.op_type == "Conv"}
    found = []
    for first in model.graph.node:
        if first.name not in own:
            continue
        tensor, clipped = first.output[0], False
        users = read.get(tensor, [])
        if len(users) == 1 and tensor not in outputs and _scales(users[0], known):
            clipped = users[0].op_type == "Clip"
            tensor = users[0].output[0]
            users = read.get(tensor, [])
        if len(users) != 1 or users[0].name not in own or users[0].input[0] != tensor or tensor in outputs:
            continue
        weight = known[users[0].input[1]].dims
        groups = next((a.i for a in users[0].attribute if a.name == "group"), 1)
        if groups == 1 or (weight[1] == 1 and groups == weight[0]):
            found.append((first, clipped, users[0]))
    return found


def _scales(node: Any, known: Any) -> bool:
    """Return whether a node is a Relu, or a Clip whose range contains zero."""
    if node.op_type != "Clip":
        return bool(node.op_type == "Relu")
    ends = [(word, side) for word, side in zip(node.input[1:], (-1, 1), strict=False) if word]
    return all(word in known and side * float(_graph.values(known[word])) >= 0 for word, side in ends)
