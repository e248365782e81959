"""What models answer, and how far two of them are apart: on one input, or over a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from widefield.surgery.answers import place_of_meant, tensors, wrapping

_NO_IMAGES = (
    "there are no images: the loader gave none. It is iterated more than once: where it gave some in the first round, "
    "it ran out; pass a list or a DataLoader."
)
_NO_NUMBERS = (
    "there is nothing to compare: no output holds a single number, as those of a detector that detects nothing; choose "
    "other images."
)


_MEND = {
    "torch.uint8 tensor": " Divide by 255 and normalise as in training.",
    "ndarray": " Pass torch.from_numpy(images).",
}
"""What to do about batches of the wrong kind."""


class NothingToCompareError(ValueError):
    """Outputs in which there is not a single number."""


@dataclass(frozen=True)
class Difference:
    """How far two models are apart on the same input, in the output tensor in which they differ most for its size."""

    max_abs: float
    """Largest absolute difference; infinite where one of the two is not finite."""
    scale: float
    """Largest absolute value of the first model's output."""

    @property
    def relative(self) -> float:
        """``max_abs`` in units of ``scale``."""
        return self.max_abs / self.scale if self.scale else self.max_abs


@dataclass(frozen=True)
class Change:
    """How far two models are apart over a data set, the first being the one to keep to.

    Of a model with several output tensors each is measured against its own size, and the worst counts: small scores
    do not hide beside large boxes. Which tensor is which is told by its place in the output.
    """

    images: int
    max_abs: float
    """Largest absolute difference, in the output in which it is the largest for that output's size; infinite where one
    of the two is not finite."""
    scale: float
    """Largest absolute value of the first model's, in the same output."""
    rms: float
    """Root of the summed squares of the differences, over that of the first model's outputs; of several outputs, the
    largest of these."""
    agreement: float | None
    """Share of images of which both have the same largest score; None where the models' answer is not (N, classes):
    their output, or the tensor in it that :func:`widefield.surgery.answers.meant` finds."""
    accuracy_before: float | None
    """Share of labelled images that the first model gets right; None without labels, class numbers from 0."""
    accuracy_after: float | None
    """The same of the second."""

    @property
    def relative(self) -> float:
        """``max_abs`` in units of ``scale``."""
        return self.max_abs / self.scale if self.scale else self.max_abs

    def __str__(self) -> str:
        """Say it in a clause."""
        text = f"outputs on {self.images} images change by {self.rms:.2g} (relative RMS)"
        if self.agreement is not None:
            text += f", top-1 the same for {self.agreement:.2%}"
        if self.accuracy_before is not None and self.accuracy_after is not None:
            text += f", accuracy {self.accuracy_before:.2%} -> {self.accuracy_after:.2%}"
        return text


class _Sums:
    """What :class:`Tally` adds up of one output tensor."""

    def __init__(self) -> None:
        self._max_abs = self._scale = self._squares = self._moved = 0.0

    def add(self, first: Tensor, second: Tensor) -> None:
        gap = (second.to(first.device) - first).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
        self._max_abs = max(self._max_abs, gap.abs().amax().item())
        self._scale = max(self._scale, first.abs().amax().item())
        self._moved += gap.square().sum().item()
        self._squares += first.square().sum().item()

    def difference(self) -> Difference:
        return Difference(self._max_abs, self._scale)

    def rms(self) -> float:
        return math.sqrt(self._moved / self._squares) if self._squares else (math.inf if self._moved else 0.0)


def _classes(labels: Any, count: int) -> Tensor | None:
    """Return labels as (N,) int64, or None where they are no class for each image; ValueError for another number."""
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):  # None, names, boxes: torch says each in its way
        return None
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim != 1 or found.is_floating_point() or found.is_complex():
        return None
    if len(found) != count:
        raise ValueError(f"there must be one label for each image; got {len(found)} labels for {count} images.")
    return found.long()


class Tally:
    """Adds up, batch by batch, how far two models' outputs are apart."""

    def __init__(self) -> None:
        self._images = self._same = self._labelled = self._right = self._right_after = 0
        self._outputs: dict[int, _Sums] = {}
        self._ranks = True

    def add(self, first: Any, second: Any, labels: Any = None, *, images: int | None = None) -> None:
        """Take in the outputs of both for one batch: the same tensors, alone or in tuples, mappings and dataclasses.

        Args:
            first, second: outputs of the two models.
            labels: whole numbers, (N,) or (N, 1), as a tensor, an array or a list; -1: unlabelled. Anything else is no
                class for each image, and is left alone.
            images: N. Default: the length of the first output tensor that has one, or else 1.

        Raises:
            ValueError: outputs that are not of the same shapes, or the first's are not finite; other than N labels.
        """
        ours, theirs = comparable(first, second)
        count = next((len(out) for out in ours if out.ndim), 1) if images is None else images
        self._images += count
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a.numel():
                self._outputs.setdefault(index, _Sums()).add(a.double(), b.double())
        place = place_of_meant(first)
        scores = None if place is None else ours[place]
        self._ranks &= scores is not None and scores.ndim == 2 and len(scores) == count and scores.shape[1] > 1
        if not self._ranks or scores is None or place is None:
            return
        before, after = scores.argmax(1), theirs[place].argmax(1).to(scores.device)
        self._same += int((before == after).sum())
        classes = _classes(labels, count)
        if classes is not None:
            classes = classes.to(before.device)
            self._labelled += int((classes >= 0).sum())  # data sets say -1 where there is no class
            self._right += int((before == classes).sum())
            self._right_after += int((after == classes).sum())

    def difference(self) -> Difference:
        """Return that of the output in which it is the largest for the output's size.

        Raises NothingToCompareError if no output held a number.
        """
        if not self._outputs:
            raise NothingToCompareError(_NO_NUMBERS)
        return max((sums.difference() for sums in self._outputs.values()), key=lambda d: d.relative)

    def change(self) -> Change:
        """Return what came of all batches.

        Raises ValueError if there was no image, and NothingToCompareError, which is one, if no output held a number.
        """
        if not self._images:
            raise ValueError(_NO_IMAGES)
        worst = self.difference()
        labelled = self._labelled if self._ranks else 0
        return Change(
            self._images,
            worst.max_abs,
            worst.scale,
            max(sums.rms() for sums in self._outputs.values()),
            self._same / self._images if self._ranks else None,
            self._right / labelled if labelled else None,
            self._right_after / labelled if labelled else None,
        )


def measure_change(first: nn.Module, second: Callable[[Tensor], Any], loader: Iterable[Any]) -> Change:
    """Run two models, in the mode they are in and without gradients, over a loader, and say how far they are apart.

    Args:
        first: the one to keep to.
        second: a model, or what :func:`widefield.deploy.load` returns.
        loader: see :func:`batches`.

    Raises:
        TypeError, ValueError: a loader that gives no images; outputs that cannot be compared.
    """
    tally = Tally()
    with torch.no_grad():
        for images, labels in batches(loader, first):
            tally.add(first(images), second(images), labels, images=len(images))
    return tally.change()


def compare(first: nn.Module, second: nn.Module, x: Tensor) -> Difference:
    """Run both models on ``x``, without gradients and in the mode they are in, and return how far they are apart."""
    with torch.no_grad():
        return difference(first(x), second(x))


def difference(first: Any, second: Any) -> Difference:
    """Return how far two models' outputs are apart.

    Raises ValueError where they are not of the same shapes, or the first's are not finite, and NothingToCompareError,
    which is one, where there is no number in them.
    """
    tally = Tally()
    tally.add(first, second)
    return tally.difference()


def comparable(first: Any, second: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors of both outputs, side by side.

    Raises ValueError where they are not of the same shapes, or the first's are not finite.
    """
    ours, theirs = tensors(first), tensors(second)
    if not ours or [t.shape for t in ours] != [t.shape for t in theirs]:
        raise ValueError(
            "the outputs cannot be compared: expected the same tensors, alone or in tuples, lists, mappings and "
            f"dataclasses; got {[tuple(t.shape) for t in ours] or type(first).__name__} and "
            f"{[tuple(t.shape) for t in theirs] or type(second).__name__}.{wrapping(first)}"
        )
    if not all(tensor.isfinite().all() for tensor in ours):
        raise ValueError("the first model's outputs are not finite, so nothing can be compared: choose another input.")
    return ours, theirs


# Images


def place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and floating-point type that a model computes in: those of its first parameter or buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


def batches(loader: Iterable[Any], model: nn.Module) -> Iterator[tuple[Tensor, Any]]:
    """Yield (images, labels or None) of a loader, images on the model's device and in its type, labels as they are.

    Args:
        loader: batches of images (N, C, H, W): tensors, {"image": tensor, "label": labels}, or (images, labels, ...).
            Labels: see :meth:`Tally.add`. It is iterated anew by every function that takes one: no generator.
        model: see above.

    Raises:
        TypeError: a tensor instead of batches, an iterator, which runs out, or batches that hold no floating-point
            images.
        ValueError: no image at all, or images of another shape.
    """
    check_loader(loader)
    device, dtype = place(model)
    empty = True
    for batch in loader:
        images = pixels(batch)
        labels = batch.get("label") if isinstance(batch, Mapping) else None
        if isinstance(batch, (tuple, list)) and len(batch) > 1:
            labels = batch[1]
        if len(images):
            empty = False
            yield images.to(device, dtype), labels
    if empty:
        raise ValueError(_NO_IMAGES)


def check_loader(loader: Any) -> None:
    """Raise TypeError for what :func:`batches` cannot iterate, again and again."""
    if isinstance(loader, Tensor):
        raise TypeError(f"loader must give batches of images; got one tensor of {tuple(loader.shape)}: pass [tensor].")
    if isinstance(loader, Iterator):
        raise TypeError(f"loader is iterated more than once, and a {type(loader).__name__} runs out: pass a list.")
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(
            "loader must give batches of images (N, C, H, W), normalised, as a DataLoader or a list of tensors does; "
            f"got {loader!r} of type {type(loader).__name__}."
        )


def pixels(batch: Any, *, clips: bool = False) -> Tensor:
    """Return the images of a batch as loaders give it: a tensor, {"image": tensor}, or (tensor, ...).

    Args:
        batch: see above.
        clips: take video clips (N, C, T, H, W), too.

    Raises:
        TypeError: no tensor of floating-point numbers.
        ValueError: another shape, or numbers that are not finite.
    """
    if isinstance(batch, Mapping):
        batch = batch.get("image")
    elif isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor) or not batch.is_floating_point():
        kind = f"{batch.dtype} tensor" if isinstance(batch, Tensor) else type(batch).__name__
        mend = _MEND.get(kind, "")
        raise TypeError(f"images must be tensors of floating-point numbers, normalised; got a {kind}.{mend}")
    if batch.ndim != 4 and not (clips and batch.ndim == 5):
        also = ", or clips (N, C, T, H, W)" if clips else ""
        raise ValueError(f"images must have the shape (N, C, H, W){also}; got {tuple(batch.shape)}.")
    finite = batch.isfinite()
    if not finite.all():
        index = int((~finite).flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"images must be finite; image {index} of {len(batch)} in a batch is not finite: nan or infinity."
        )
    return batch


def example_input(model: nn.Module) -> Tensor:
    """Return noise that a model should run on, (2, C, H, W), on its device and in its type.

    C is that of its first convolution, and H and W are those of timm's configuration, or else 64. Raises ValueError
    for a model without layers that tell their input channels.
    """
    channels = [getattr(m, "in_channels", None) for m in model.modules()]
    first = next((count for count in channels if isinstance(count, int)), None)
    if first is None:
        raise ValueError("no example input could be made up for this model: pass one.")
    config = getattr(model, "pretrained_cfg", None) or {}
    _, height, width = config.get("input_size") or (None, 64, 64)
    device, dtype = place(model)
    return torch.randn(2, first, height, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
