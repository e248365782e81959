"""Read images from loaders, and make example inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.surgery.detections import TARGETS, targets_in
from widefield.surgery.poses import LABELS as KEYPOINTS

LABELS = ("mask", "label")
"""Keys of labels in batches that are mappings: masks of segmentation, classes of images. The first one counts.
Key points, a tensor (N, K, 3) under "keypoints", come before them."""

_BY_IMAGE = (*LABELS, *TARGETS)
"""Keys of batches with an entry for each image."""

Example = Tensor | int | Sequence[int]
"""An example input: one batch, or its size as one side, (H, W), (C, H, W) or (N, C, H, W)."""

_NO_IMAGES = (
    "the loader gave no images. It is iterated more than once: if it gave images in the first pass, it ran out. Pass a "
    "list or a DataLoader."
)

_HINTS = {
    "torch.uint8 tensor": " Divide by 255 and normalize as in training.",
    "ndarray": " Pass torch.from_numpy(images).",
}
"""Advice for batches of the wrong type."""


def place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of a model's first floating-point parameter or buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


def batches(loader: Iterable[Any], model: nn.Module) -> Iterator[tuple[Tensor, Any]]:
    """Yield (images, labels or None) from a loader, with images on the model's device and in its dtype.

    Args:
        loader: batches of images (N, C, H, W): tensors, {"image": tensor, "label": labels}, {"image": tensor, "mask":
            masks}, {"image": tensor, "keypoints": key points}, {"image": tensor, "boxes": [...], "labels": [...]} with
            an entry per image, or (images, labels, ...), in which labels may be a list of {"boxes": ..., "labels":
            ...}. Images of several sizes are a list of tensors (C, H, W), which are yielded one by one. It is iterated
            once for every call of this function, so it must not be a generator.
        model: gives device and dtype.

    Raises:
        TypeError: a tensor instead of batches, an iterator, or batches without floating-point images.
        ValueError: no images at all, or images of another shape.
    """
    check_loader(loader)
    device, dtype = place(model)
    empty = True
    for batch in chain.from_iterable(map(_of_one_size, loader)):
        images = pixels(batch)
        labels = None
        if isinstance(batch, Mapping):
            labels = _labels(batch)
        elif isinstance(batch, (tuple, list)) and len(batch) > 1:
            labels = batch[1]
        if len(images):
            empty = False
            yield images.to(device, dtype), labels
    if empty:
        raise ValueError(_NO_IMAGES)


def _labels(batch: Mapping[str, Any]) -> Any:
    """Return the labels of a batch, or None."""
    if isinstance(batch.get(KEYPOINTS), Tensor):  # lists of them belong to the objects of detection
        return batch[KEYPOINTS]
    return next((batch[name] for name in LABELS if batch.get(name) is not None), targets_in(batch))


def _of_one_size(batch: Any) -> Iterator[Any]:
    """Yield a batch as it is, or one by one if its images are a list."""
    named = isinstance(batch, Mapping)
    images = batch.get("image") if named else batch[0] if isinstance(batch, (tuple, list)) and batch else None
    if not isinstance(images, (list, tuple)) or not all(isinstance(image, Tensor) for image in images):
        yield batch
        return
    for index, image in enumerate(images):
        if named:
            rest = {name: values[index : index + 1] for name, values in batch.items() if name in _BY_IMAGE}
            yield {"image": image[None], **{name: values for name, values in rest.items() if values is not None}}
        else:
            yield (image[None], *(values[index : index + 1] for values in batch[1:2]))


def check_loader(loader: Any) -> None:
    """Raise TypeError for anything that :func:`batches` cannot iterate repeatedly."""
    if isinstance(loader, Tensor):
        raise TypeError(f"loader must give batches of images; got one tensor of {tuple(loader.shape)}: pass [tensor].")
    if isinstance(loader, Iterator):
        raise TypeError(f"loader is iterated more than once, and a {type(loader).__name__} runs out: pass a list.")
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(
            "loader must give batches of normalized images (N, C, H, W), such as a DataLoader or a list of tensors; "
            f"got {loader!r} of type {type(loader).__name__}."
        )


def pixels(batch: Any, *, clips: bool = False) -> Tensor:
    """Return the images of one batch.

    Args:
        batch: a tensor, {"image": tensor}, or (tensor, ...).
        clips: whether video clips (N, C, T, H, W) are allowed.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another shape, or numbers that are not finite.
    """
    if isinstance(batch, Mapping):
        batch = batch.get("image")
    elif isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor) or not batch.is_floating_point():
        kind = f"{batch.dtype} tensor" if isinstance(batch, Tensor) else type(batch).__name__
        hint = _HINTS.get(kind, "")
        raise TypeError(f"images must be floating-point tensors, normalized; got a {kind}.{hint}")
    if batch.ndim != 4 and not (clips and batch.ndim == 5):
        also = ", or clips (N, C, T, H, W)" if clips else ""
        raise ValueError(f"images must have the shape (N, C, H, W){also}; got {tuple(batch.shape)}.")
    finite = batch.isfinite()
    if not finite.all():
        index = int((~finite).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"images must be finite; image {index} of {len(batch)} in a batch holds nan or infinity.")
    return batch


def example_input(model: nn.Module, given: Example | None = None) -> Tensor:
    """Return an example input for a model.

    Args:
        model: gives the device, the dtype, and the channels if the size does not.
        given: a tensor, which is returned as it is; or the size of a batch of noise, as one side, (H, W), (C, H, W) or
            (N, C, H, W). Default: the input size in timm's configuration, or else 64x64.

    Returns:
        (N, C, H, W), with N = 2 unless given.

    Raises:
        TypeError, ValueError: neither a tensor nor a size; the channels are neither given nor known from any layer.
    """
    if isinstance(given, Tensor):
        return given
    if given is None:
        config = getattr(model, "pretrained_cfg", None) or {}
        size: tuple[int, ...] = tuple(config.get("input_size") or (64, 64))[-2:]
    else:
        size = _size(given)
    channels = size[-3] if len(size) > 2 else _channels(model, given)
    batch_size = size[0] if len(size) == 4 else 2
    device, dtype = place(model)
    noise = torch.randn(batch_size, channels, *size[-2:], generator=torch.Generator().manual_seed(0))
    return noise.to(device, dtype)


def _size(given: object) -> tuple[int, ...]:
    sides = given if isinstance(given, (tuple, list)) else (given, given)
    error = TypeError if isinstance(given, str) or not isinstance(given, (int, tuple, list)) else ValueError
    if error is TypeError or not 1 <= len(sides) <= 4:
        raise error(
            "example_input must be a tensor (N, C, H, W) or its size, as one side, (H, W), (C, H, W) or (N, C, H, W); "
            f"got {given!r}."
        )
    size = tuple(_checks.integer("every side in example_input", side) for side in sides)
    return size if len(size) > 1 else size * 2


def _channels(model: nn.Module, given: object) -> int:
    """Return the input channels of the first layer that has any."""
    channels = [getattr(module, "in_channels", None) for module in model.modules()]
    first = next((count for count in channels if isinstance(count, int)), None)
    if first is not None:
        return first
    if given is None:
        raise ValueError("no example input could be made up for this model: pass example_input.")
    raise ValueError("the number of image channels is unknown: pass example_input=(C, H, W).")
