"""Bring networks into the merged forms in which authors publish weights, so that those load."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from torch import nn

from widefield.nn.reparam import ReparamConv2d
from widefield.surgery.walk import fuse_layers

Select = Callable[[nn.Module], bool]
"""Whether a mergeable module is merged."""


def every_layer(module: nn.Module) -> bool:
    """Select everything, as the code of UniRepLKNet does."""
    return True


def large_kernels(module: nn.Module) -> bool:
    """Select large kernels only, as the code of RepLKNet and SLaK does."""
    return isinstance(module, ReparamConv2d)


def merged_forms(model: nn.Module) -> Iterator[tuple[Select, nn.Module]]:
    """Yield each form in which merged weights are published: what is merged, and a copy of the model in this form.

    The copy is on the meta device, so it has only keys and shapes. The model stays as it is.
    """
    for select in (every_layer, large_kernels):
        yield select, fuse_layers(copy.deepcopy(model).to("meta").eval(), select=select)[0]


def merge_in_place(model: nn.Module, select: Select) -> None:
    """Merge the selected layers of a model, in either mode; their numbers are about to be overwritten."""
    training = model.training
    fuse_layers(model.eval(), select=select)
    model.train(training)
