"""What analyses of classifiers share."""

from __future__ import annotations

from torch import Tensor, nn

from widefield.analysis._model import running


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits of a classifier, (N, classes); raises ValueError for a model that gives something else."""
    with running(model, images):
        found = model(images)
    if not isinstance(found, Tensor) or found.ndim != 2 or not found.is_floating_point():
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"a classifier is needed, which gives logits (N, classes); {type(model).__name__} gave {got}.")
    return found
