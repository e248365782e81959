"""Share what the tasks about classes of whole images have in common: class names, logits, weights of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from widefield import _checks
from widefield.surgery.answers import described, wrapping
from widefield.tasks.base import Task, tried


class ImageClasses(Task):
    """A task about the classes of whole images, for models from (N, C, H, W) to logits (N, num_classes).

    Args:
        num_classes: number of classes.
        class_names: names of the classes; default: their indices.

    Raises:
        ValueError: there is another number of names.
    """

    def __init__(self, num_classes: int, class_names: Sequence[str] | None) -> None:
        self.num_classes = num_classes
        self.class_names = tuple(map(str, range(num_classes) if class_names is None else class_names))
        if len(self.class_names) != num_classes:
            raise ValueError(f"class_names must be {num_classes} names; got {len(self.class_names)}.")
        self.model_args = {"num_classes": num_classes}

    def check(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless a model gives a logit for each class."""
        outputs = count_outputs(model, shape)
        if outputs != self.num_classes:
            raise ValueError(f"it gives {outputs} outputs, and the task needs {self.num_classes}, one for each class.")


def weights_of(option: str, value: Any, count: int) -> str | list[float] | None:
    """Return weights of classes: ``count`` numbers, ``"balanced"`` or None; raises ValueError or TypeError."""
    if value is None:
        return None
    if value == "balanced":
        return "balanced"
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != count:
        raise ValueError(f"{option} must be balanced, or {count} numbers, one for each class; got {value!r}.")
    return [_checks.number(f"every entry of {option}", weight) for weight in value]


def count_outputs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Return how many logits a model gives for an image, from one forward pass in evaluation mode.

    Args:
        model: left in its mode.
        shape: (C, H, W) of the image.

    Raises:
        ValueError: the model refuses such images, or does not return one vector per image.
    """
    try:
        logits = tried(model, shape)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{type(model).__name__} refuses images of {'x'.join(map(str, shape))} (channels, height, width): {reason}"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(
            f"{type(model).__name__} gives no logits (N, classes) for images; it gives {described(logits)}."
            f"{wrapping(logits)}"
        )
    return logits.shape[1]
