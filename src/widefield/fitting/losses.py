"""Losses of single images in evaluation mode, for any task, and statistics of batch norms for chosen sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widefield.data import SampleSet
from widefield.data.base import seeded
from widefield.dense.detector import Detector
from widefield.fitting.halves import Part
from widefield.surgery.answers import evaluating
from widefield.tasks import Batch, Task
from widefield.train.loaders import batches, shut_down, val_loader
from widefield.train.optimization import freeze
from widefield.train.recipe import Recipe

_HELD = 2**29
"""Most bytes of batches that are kept in memory, 512 MB; more are read again for each assignment."""
_NORM_IMAGES = 256
"""Train images from which batch norms get the statistics of an assignment."""
_UNITS = 32
"""Batches that a half is divided into at least, if possible, for tasks whose loss is of a batch."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Batches:
    """The batches of a data set, in order; kept in memory if they are small."""

    def __init__(self, dataset: SampleSet, task: Task, size: int, workers: int, device: torch.device) -> None:
        self._arguments = dataset, task.collate, size, workers
        self._device = device
        self._held: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._held is not None:
            yield from self._held
            return
        found: list[Batch] | None = []
        loader = val_loader(*self._arguments)
        try:
            for batch in batches(loader):
                if not batch:
                    continue
                moved = send_to_device(batch, self._device)
                if found is not None:
                    found.append(moved)
                    if sum(map(_bytes, found)) > _HELD:
                        found = None
                yield moved
        finally:
            shut_down(loader)
        self._held = found


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


class Losses:
    """Measures the loss of each image, or of each small batch, of a data set by a model in evaluation mode.

    Tasks with ``image_losses`` give the loss of each image. For others it is the training loss of small batches.
    Detectors compute theirs in training mode, here with norms and dropout in evaluation mode and with the same random
    samples for every model.

    Args:
        dataset: the images.
        task: what the model is trained for.
        recipe: batch size, workers and precision.
        device: where to compute.
    """

    def __init__(self, dataset: SampleSet, task: Task, recipe: Recipe, device: torch.device) -> None:
        self._task, self._recipe, self._device = task, recipe, device
        self._per_image: bool | None = None
        small = max(1, min(recipe.batch_size, len(dataset) // _UNITS))
        self._few = Batches(dataset, task, small, recipe.workers, device)
        self._many = Batches(dataset, task, recipe.batch_size, recipe.workers, device)

    def __call__(self, model: nn.Module) -> list[float]:
        """Return the losses of a model.

        Raises:
            FloatingPointError: one is NaN or infinite.
            ValueError: there are none.
        """
        found: list[Tensor] = []
        if self._per_image is not False:
            for batch in self._many:
                values = self._of_images(model, batch)
                if values is None:
                    break
                found.append(values)
            self._per_image = bool(found)
        if not self._per_image:
            found = [self._of_batch(model, batch, number) for number, batch in enumerate(self._few)]
        if not found:
            raise ValueError("there is nothing to read: none of the images of the val split can be read.")
        losses: list[float] = torch.cat(found).double().cpu().tolist()
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError(
                f"the loss of {type(model).__name__} on the val split is NaN or infinite. Try a lower optimizer.lr."
            )
        return losses

    def blind(self) -> float:
        """Return the loss of the best answer that is the same for all images; infinity if the task does not know it."""
        found = self._task.blind_loss(self._many)
        return math.inf if found is None else found

    def _of_images(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """Return the losses of a batch's images, (N,), if the task gives them."""
        with evaluating(model), torch.no_grad(), autocast(self._recipe, self._device):
            values = self._task.image_losses(model, laid_out(batch, self._recipe))
        return None if values is None else values.float()

    def _of_batch(self, model: nn.Module, batch: Batch, number: int) -> Tensor:
        with _losing(model), torch.no_grad(), autocast(self._recipe, self._device), torch.random.fork_rng():
            torch.manual_seed(number)  # the generators of GPUs, too
            with seeded((number,)):
                loss = self._task.loss(model, laid_out(batch, self._recipe))
        return loss.detach().float()[None]


@contextmanager
def _losing(model: nn.Module) -> Iterator[None]:
    """Let a model compute its loss as in evaluation mode: only detectors need parts in training mode."""
    with evaluating(model):
        if isinstance(model, Detector):
            for name, module in model.named_modules():
                # Leaves are norms, dropout and convolutions; the heads themselves tell losses from detections.
                if not name.startswith(("backbone.", "neck.")) and any(True for _ in module.children()):
                    module.training = True
        yield


def autocast(recipe: Recipe, device: torch.device) -> Any:
    """Return the context of a recipe's precision."""
    dtype = _DTYPES.get(recipe.mixed_precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def laid_out(batch: Batch, recipe: Recipe) -> Batch:
    """Return a batch in the memory order of a recipe."""
    image = batch.get("image")
    if not recipe.channels_last or not isinstance(image, Tensor):
        return batch
    return {**batch, "image": image.contiguous(memory_format=torch.channels_last)}


class Norms:
    """Gives the batch norms of a model the statistics of train images, for its current kernel sizes.

    Norms that training holds fixed keep theirs. A model without batch norms needs nothing, and reads no images.

    Args:
        model: whose norms.
        train: the train split.
        task: makes batches.
        recipe: batch size, precision and frozen parts.
        device: where to compute.
    """

    def __init__(self, model: nn.Module, train: SampleSet, task: Task, recipe: Recipe, device: torch.device) -> None:
        self._model, self._recipe, self._device = model, recipe, device
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        resting = set(freeze(model, recipe.freeze)) if recipe.freeze else set()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train()
        self._norms = [
            module
            for module in model.modules()
            if isinstance(module, _BatchNorm)
            and module.training
            and module.track_running_stats
            and module not in resting
        ]
        model.eval()
        if self._norms:
            order = np.random.default_rng((recipe.seed, 0)).permutation(len(train))[:_NORM_IMAGES]
            self._batches = Batches(Part(train, order.tolist()), task, recipe.batch_size, recipe.workers, device)

    def update(self) -> None:
        """Replace the statistics: means over the batches."""
        if not self._norms:
            return
        momenta = [norm.momentum for norm in self._norms]
        with evaluating(self._model), torch.no_grad(), autocast(self._recipe, self._device):
            for norm in self._norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.training = True
            try:
                for batch in self._batches:
                    image = laid_out(batch, self._recipe)["image"]
                    if len(image) > 1:
                        self._model(image)
            finally:
                for norm, momentum in zip(self._norms, momenta, strict=True):
                    norm.momentum = momentum


def device_of() -> torch.device:
    """Return where training runs: a GPU if there is one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found


def ring_energies(kernel: Tensor) -> Sequence[float]:
    """Return the share of each square ring in the squares of a kernel, center first.

    Args:
        kernel: (out, in, k, k).
    """
    size = kernel.shape[-1]
    offset = (torch.arange(size) - size // 2).abs()
    ring = torch.maximum(offset[:, None], offset[None])
    squares = kernel.detach().double().cpu().pow(2).sum((0, 1))
    total = float(squares.sum()) or 1.0
    return [float(squares[ring == radius].sum()) / total for radius in range(size // 2 + 1)]
