"""Change the kernel sizes of a model: to one of several, drawn at each training step, or to a fixed one."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from widefield import _checks, _history
from widefield.nn import DepthwiseConv2d, ElasticConv2d, elastic
from widefield.surgery.conversions import Conversion, Place


@dataclass(frozen=True)
class Elastic(Conversion):
    """Let convolutions run at several kernel sizes, :class:`widefield.nn.ElasticConv2d`, to find out which fit.

    The model's function is preserved; a size smaller than the convolution's own crops its kernel. The convolution's own
    size is always among the sizes. :func:`draw_sizes` draws sizes for a training step, :func:`choose_sizes` sets them,
    and ``reparameterize`` merges each layer into a plain convolution of its active size.

    Args:
        kernel_sizes: the sizes to choose from, odd.
        stage: index of the first stage. :func:`draw_sizes` groups the layers by stage; give several conversions of one
            model different numbers.
        init: "preserve", see above; "random" initializes the layers anew: all sizes then start as the smallest one, and
            train faster than crops of a random kernel, which have nothing in common.

    Raises:
        TypeError, ValueError: sizes that the layer refuses.
    """

    layers = (ElasticConv2d,)
    kernel_sizes: tuple[int, ...] = (3, 5, 7, 11)
    stage: int = 0
    init: str = "preserve"

    def __post_init__(self) -> None:
        _checks.init(self.init)
        object.__setattr__(self, "kernel_sizes", elastic.checked_sizes(self.kernel_sizes))

    def at(self, place: Place) -> Conversion:
        """Return the config for this stage."""
        return self._with(stage=self.stage + place.stage)

    def _why_not(self, module: nn.Module) -> str | None:
        return elastic.why_not(module)

    def _replace(self, conv: nn.Conv2d) -> nn.Module:
        layer = ElasticConv2d.from_conv2d(conv, self.kernel_sizes, init=self.init)
        layer.stage = self.stage
        return layer


@dataclass(frozen=True)
class Resize(Conversion):
    """Give convolutions another kernel size: kernels are cropped, or padded with zeros.

    A larger kernel keeps the model's function; a smaller one does not. Depthwise convolutions become
    :class:`widefield.nn.DepthwiseConv2d`, with the same keys.

    Args:
        kernel_size: the new size, odd.

    Raises:
        TypeError, ValueError: a size that is not odd.
    """

    layers = (DepthwiseConv2d,)
    kernel_size: int

    def __post_init__(self) -> None:
        _checks.odd("kernel_size", self.kernel_size)

    def _why_not(self, module: nn.Module) -> str | None:
        return elastic.why_not(module)

    def _replace(self, conv: nn.Conv2d) -> nn.Module:
        return elastic.resized(conv, self.kernel_size)


def elastic_layers(model: nn.Module) -> dict[str, ElasticConv2d]:
    """Return the elastic convolutions of a model by name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ElasticConv2d)}


def draw_sizes(model: nn.Module, seed: int, step: int) -> None:
    """Draw the size at which every elastic convolution runs in one training step; a no-op without such layers.

    A third of the steps has one size for all layers, a third one for each stage, and a third one for each layer. Each
    size is equally likely. Layers that do not have a drawn size take their nearest smaller one, or their smallest.

    The sizes depend on the seed, the step and the layers alone. Processes therefore agree without exchanging anything,
    and a resumed training draws what it would have drawn. Evaluation uses the chosen sizes (:func:`choose_sizes`).

    Args:
        model: any model.
        seed: of the training.
        step: its number.
    """
    layers = elastic_layers(model).values()
    sizes = sorted({size for layer in layers for size in layer.kernel_sizes})
    stream = random.Random(f"{seed} {step}")
    unit = stream.choice(("network", "stage", "layer"))
    drawn: dict[int, int] = {}
    for index, layer in enumerate(layers):
        key = {"network": 0, "stage": layer.stage, "layer": index}[unit]
        if key not in drawn:
            drawn[key] = stream.choice(sizes)
        layer.drawn = layer.nearest(drawn[key])


def choose_sizes(model: nn.Module, sizes: Mapping[str, int] | int | None = None) -> None:
    """Choose the size of the elastic convolutions of a model, in evaluation mode and for ``reparameterize``.

    Args:
        model: any model with elastic convolutions.
        sizes: name of a layer -> its size; layers that are not named stay as they are. An integer: the same size for
            all; layers without it take their nearest smaller one, or their smallest. None: every layer's largest.

    Raises:
        ValueError: a name that is not an elastic convolution, or a size that the layer does not have.
    """
    layers = elastic_layers(model)
    if isinstance(sizes, Mapping):
        for name in sizes:
            if name not in layers:
                raise ValueError(f"{name!r} is not an elastic convolution.{_checks.did_you_mean(name, list(layers))}")
        chosen = {name: layers[name].checked(size) for name, size in sizes.items()}
    else:
        most = math.inf if sizes is None else sizes
        chosen = {name: layer.nearest(most) for name, layer in layers.items()}
    for name, size in chosen.items():
        layers[name].kernel_size = size
    if chosen:
        _history.note(model, "choose_sizes", sizes=chosen)
