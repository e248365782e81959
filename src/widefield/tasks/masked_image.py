"""Define the task of masked image modeling: predict what is hidden of an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from widefield import _checks
from widefield.masking import METHODS, FrequencyLoss, MaskedAutoencoder, Method, reach, refuse_leak
from widefield.surgery.answers import evaluating
from widefield.tasks.base import Batch, Labeled, Task, sum_of, training_on
from widefield.tasks.metric_names import HEADLINES
from widefield.tasks.predictions import Prediction, ReconstructionPrediction

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


class MaskedImage(Task):
    """Pre-training of an encoder by predicting the masked patches of images: FCMAE, SparK, SimMIM or A2MIM.

    The model is a :class:`widefield.masking.MaskedAutoencoder`. In training, masks are drawn by PyTorch's global
    generator on the CPU, whose state is part of checkpoints. In evaluation, the mask of an image depends on its place
    in the data set alone.

    Metrics: ``loss``, at masked places of the val images; and if images have labels ``knn_top1``, the share of val
    images whose class is that of their nearest neighbors among the other val images, by the cosine of the last map's
    means (Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4).

    Batches hold ``image`` float32 (N, C, H, W), and ``label`` int64 (N,) if images have labels.

    Args:
        mean, std: of the channels, by which images were normalized; for pictures.
        num_classes: number of classes of the labels; 0 without labels.
        method: a key of ``widefield.masking.METHODS``, whose parts the other options change.
        patch, ratio, rounding, shape: of the mask, see :class:`widefield.masking.PatchMask`.
        visible, fill, token_stage, token, decoder, decoder_args, target, error, grn: see
            :class:`widefield.masking.Method`.
        frequency: arguments of :class:`widefield.masking.FrequencyLoss`; null: that of the method.
        out_indices: the maps that the decoder gets, by position; null: the last one, or the last four for a U-Net.
        neighbors: number of nearest neighbors; 0: ``knn_top1`` is not measured.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range; the message names it.
    """

    headline = HEADLINES["masked_image"]
    higher_is_better = False
    rating = "the loss of its reconstruction"
    pictured = 6

    def __init__(
        self,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        num_classes: int = 0,
        *,
        method: str = "fcmae",
        patch: int | None = None,
        ratio: float | None = None,
        rounding: str | None = None,
        shape: str | None = None,
        visible: bool | None = None,
        fill: str | None = None,
        token_stage: int | None = None,
        token: str | None = None,
        decoder: str | None = None,
        decoder_args: Mapping[str, Any] | None = None,
        target: str | None = None,
        error: str | None = None,
        frequency: Mapping[str, Any] | None = None,
        grn: str | None = None,
        out_indices: Sequence[int] | None = None,
        neighbors: int = 20,
    ) -> None:
        self.mean, self.std, self.num_classes = tuple(mean), tuple(std), num_classes
        self.neighbors = _checks.integer("neighbors", neighbors, minimum=0) if num_classes else 0
        self._out_indices = out_indices
        base = METHODS[_checks.choice("method", method, tuple(METHODS))]
        masked: dict[str, Any] = {"patch": patch, "ratio": ratio, "rounding": rounding, "shape": shape}
        mask = dataclasses.replace(base.mask, **{name: value for name, value in masked.items() if value is not None})
        parts: dict[str, Any] = {
            "visible": visible, "fill": fill, "token_stage": token_stage, "token": token, "decoder": decoder,
            "decoder_args": decoder_args, "target": target, "error": error, "grn": grn,
            "frequency": None if frequency is None else FrequencyLoss(**frequency),
        }  # fmt: skip
        given = {name: value for name, value in parts.items() if value is not None}
        self.method: Method = dataclasses.replace(base, mask=mask, **given)

    @classmethod
    def for_data(cls, dataset: Labeled, **options: Any) -> Self:
        """Build the task for a data set of images, with or without classes."""
        mean, std = (getattr(dataset, name, ()) for name in ("mean", "std"))
        return cls(mean, std, len(dataset.classes), **options)

    def model(self, backbone: nn.Module) -> nn.Module:
        """Return a :class:`widefield.masking.MaskedAutoencoder` with this encoder."""
        return MaskedAutoencoder(backbone, self.method, out_indices=self._out_indices)

    def check(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        """Raise ValueError if the patches do not suit images, or visible positions depend on masked ones."""
        if not isinstance(model, MaskedAutoencoder):
            raise ValueError(f"{type(model).__name__} is not a widefield.masking.MaskedAutoencoder.")
        rows, columns = self.method.mask.grid(*shape[1:])
        self.method.mask.count(rows, columns)
        refuse_leak(model)

    def remark(self, model: Any, shape: tuple[int, int, int]) -> str:
        """Return how many masked pixels reach the encoder."""
        return f"masking: {reach(model, shape)}"

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of the batch, a scalar."""
        return sum_of(self.losses(model, batch))

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of the batch by name, scalars."""
        image = batch["image"]
        mask, visible = self._mask(len(image), image)
        with training_on(image):
            found: dict[str, Tensor] = model(image, mask, visible)
        return found

    def _mask(self, images: int, like: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, int]:
        """Return masks, and the number of visible patches of each image."""
        height, width = like.shape[2:]
        mask = self.method.mask.draw(images, height, width, generator)
        patches = mask[0].numel()
        return mask.to(like.device), patches - self.method.mask.count(*mask.shape[1:])

    def _fixed(self, image: Tensor, places: Sequence[int]) -> tuple[Tensor, int]:
        """Return the masks of val images at these places of the set."""
        parts = [self._mask(1, image, torch.Generator().manual_seed(place)) for place in places]
        return torch.cat([mask for mask, _ in parts]), parts[0][1]

    def outputs(self, model: Any, batch: Batch) -> dict[str, Any]:
        """Return ``value`` (N,), the loss of each image, and with labels ``features`` (N, C) and ``target`` (N,)."""
        image = batch["image"]
        index = batch.get("index")
        mask, visible = self._fixed(image, range(len(image)) if index is None else index.tolist())
        prediction = model.predict(image, mask, visible)
        each: Any = torch.vmap(lambda *parts: sum_of(model.losses(*(part[None] for part in parts))))
        found: dict[str, Any] = {"value": each(prediction, image, mask)}
        if self.neighbors and "label" in batch:
            features = model.encoder(image)[-1].mean((2, 3)).float()
            found |= {"features": features, "target": batch["label"]}
        return found

    def predict(self, model: Any, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return each image with its mask and the reconstruction, at the size that the model sees."""
        return [*self._predictions(model, images, range(len(images)))]

    def predict_batch(self, model: Any, batch: Batch, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return what :meth:`predict` does, with the masks that evaluations have for these images."""
        return [*self._predictions(model, batch["image"], batch["index"].tolist())]

    def pictures(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """Return ``reconstructions``: a row for each image, its visible part and the prediction."""
        panels = [one.panel() for one in self._predictions(model, batch["image"], batch["index"].tolist())]
        gap = panels[0].new_full((3, 4, panels[0].shape[2]), 255)
        return {"reconstructions": torch.cat([part for panel in panels for part in (panel, gap)][:-1], 1)}

    def _predictions(self, model: Any, images: Tensor, places: Sequence[int]) -> list[ReconstructionPrediction]:
        mask, visible = self._fixed(images, places)
        with evaluating(model), torch.no_grad():
            prediction = model.predict(images, mask, visible)
        restored = model.target.restored(prediction.float(), images.float()) if model.target.step == 1 else None
        side = self.method.mask.patch
        return [
            ReconstructionPrediction(
                image=self._pixels(image),
                masked=hidden.repeat_interleave(side, 0).repeat_interleave(side, 1).cpu(),
                reconstruction=None if restored is None else self._pixels(restored[row]),
            )
            for row, (image, hidden) in enumerate(zip(images, mask, strict=True))
        ]

    def _pixels(self, image: Tensor) -> Tensor:
        """Return a normalized image (C, H, W) as uint8 (3, H, W) on the CPU."""
        image = image.detach().float().cpu()
        mean, std = (torch.tensor(values or (default,)) for values, default in ((self.mean, 0.0), (self.std, 1.0)))
        pixels = image * std[:, None, None] + mean[:, None, None]
        return (255 * pixels.expand(3, -1, -1).clamp(0, 1)).round().to(torch.uint8)

    def rate(self, outputs: Mapping[str, Any]) -> Tensor:
        """Return the negative loss of each image."""
        value: Tensor = -outputs["value"].double().cpu()
        return value

    def rated(self, rating: float) -> str:
        """Return the loss of an image as text."""
        return f"{-rating:.3g}"

    def metrics(self) -> MetricCollection:
        """Return ``loss`` and, with labels, ``knn_top1``."""
        from torchmetrics import MeanMetric, MetricCollection

        from widefield.tasks.nearest import NearestNeighbors

        found: dict[str, Any] = {"loss": MeanMetric(sync_on_compute=False)}
        if self.neighbors:
            found["knn_top1"] = NearestNeighbors(self.num_classes, self.neighbors, sync_on_compute=False)
        return MetricCollection(found, compute_groups=False)
