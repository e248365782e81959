"""Make a model's input of images: of files of any size, and of the data of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from widefield import data
from widefield.loading.labels import output_places
from widefield.surgery.answers import evaluating, meant
from widefield.surgery.inputs import place
from widefield.train import RunData

CLASSIFIERS = ("classification", "multilabel")
"""Tasks whose models give one number for each class."""
SQUARE = (*CLASSIFIERS, "masked_image")
"""Tasks whose images are cut to squares."""


@dataclass(frozen=True)
class Classes:
    """The classes of a model, in the form in which a task takes a data set."""

    classes: tuple[str, ...]


class Cropped:
    """Makes a classifier's input of an image: resized, cropped and normalized."""

    def __init__(self, transform: Callable[[Image.Image], Tensor], channels: int) -> None:
        self.transform, self.channels = transform, channels

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the input, float32 (C, H, W), for an RGB image."""
        return self.transform(image.convert("L") if self.channels == 1 else image)


class Fitted:
    """Makes a segmentation model's input of an image: resized with its aspect ratio and normalized."""

    def __init__(
        self, scale: Sequence[int] | None, mean: Sequence[float], std: Sequence[float], *, antialias: bool
    ) -> None:
        from widefield.data import joint  # torchvision.transforms.v2 is slow to import

        self.channels = len(mean)
        self.transform = joint.evaluation(scale, mean, std, antialias=antialias)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the input, float32 (C, H, W), for an RGB image."""
        from torchvision.transforms.functional import pil_to_tensor

        from widefield.data import joint

        pixels = pil_to_tensor(image.convert("L") if self.channels == 1 else image)
        prepared: Tensor = joint.apply(self.transform, {"image": pixels})["image"]
        return prepared


class Pixels:
    """Makes a pose model's input of an image: its pixels, of which it gets crops later."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the pixels, uint8 (C, H, W), of an RGB image."""
        from torchvision.transforms.functional import pil_to_tensor

        pixels: Tensor = pil_to_tensor(image.convert("L") if self.channels == 1 else image)
        return pixels


def count_maps(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Return how many logits a segmentation model gives for a pixel of an image (C, H, W), from one forward pass.

    Raises ValueError for outputs of another form.
    """
    device, dtype = place(model)
    with evaluating(model), torch.no_grad():
        found = meant(model(torch.zeros(1, *shape, device=device, dtype=dtype)))
    if found is None or found.ndim != 4:
        raise ValueError(f"{type(model).__name__} gives no logits (N, classes, H, W) for images.")
    return found.shape[1]


class Selection(data.SampleSet):
    """Some of the samples of a data set.

    Args:
        whole: the data set.
        count: number of samples; a seeded choice if there are more.
        seed: of the choice.
        complete: of a set of poses, take all samples of some files, ``count`` at least. Metrics need them: the first
            sample of a file brings its people, against which the poses of the others are measured.
    """

    def __init__(self, whole: data.SampleSet, count: int, seed: int = 0, *, complete: bool = False) -> None:
        super().__init__(whole.split, whole.seed)
        self._whole = whole
        self.classes, self.mean, self.std, self.image_size = whole.classes, whole.mean, whole.std, whole.image_size
        generator = torch.Generator().manual_seed(seed)
        if complete and isinstance(whole, data.PoseSet):
            self._indices = _of_files(torch.from_numpy(whole.boxes.files), count, generator)
        else:
            self._indices = sorted(torch.randperm(len(whole), generator=generator)[:count].tolist())

    def __len__(self) -> int:
        return len(self._indices)

    def sample(self, index: int) -> data.Sample | None:
        """Return sample ``index`` of the choice."""
        return self._whole[self._indices[index]]

    def name(self, index: int) -> str:
        """Return the file of a sample, or its place in the whole set."""
        named: Any = getattr(self._whole, "name", None)
        place = self._indices[index]
        return str(named(place)) if callable(named) else f"image {place}"


def _of_files(files: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Return the samples of a choice of files: as few files as have at least ``count`` samples.

    Args:
        files: int64 (N,), the file of each sample.
        count: number of samples.
        generator: of the choice.
    """
    known, sizes = files.unique(return_counts=True)
    order = torch.randperm(len(known), generator=generator)
    fewer = sizes[order].cumsum(0) - sizes[order] < count
    chosen: list[int] = torch.isin(files, known[order[fewer]]).nonzero()[:, 0].tolist()
    return chosen


class OwnPictures(data.Pictures):
    """Images of a run's data set, whose labels are indices of the model's outputs."""

    def __init__(self, trained_on: RunData, source: str, **given: Any) -> None:
        super().__init__(source, **given)
        trained_on.check_classes(self.classes)
        self._places = output_places(self.classes, len(trained_on.classes), trained_on.classes)
        self.classes = trained_on.classes if self.classes else ()  # masks have no label
        self.own_labels = "label" if self.classes else "mask"
        self._note = "" if self._from is None else trained_on.note(self._from)

    def found(self) -> str:
        """Return what `Pictures` does, and what has changed since the run."""
        return f"{super().found()}; {self._note}" if self._note else super().found()

    def sample(self, index: int) -> data.Sample:
        """Return image ``index``."""
        found = super().sample(index)
        return {**found, "label": self._places[found["label"]] if self.classes else -1}


def crop_sides(crop_size: tuple[int, int] | None, size: int) -> tuple[int, int]:
    """Return the (height, width) of a run's crops for another shorter side; ``crop_size`` None: square ones."""
    height, width = crop_size or (1, 1)
    return round(height * size / min(height, width)), round(width * size / min(height, width))


def with_true_boxes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a set of poses without the boxes of a detector."""
    return {name: value for name, value in options.items() if name != "boxes"}


class CutPictures(data.Pictures):
    """The middle of other pictures, with the sides of a pose run's crops.

    Args:
        source: as of `Pictures`.
        crop: (height, width), in place of the size.
        given: further arguments of `Pictures`.
    """

    def __init__(self, source: str, crop: tuple[int, int], **given: Any) -> None:
        self._square = data.Pictures(source, **{**given, "size": max(crop)})
        data.LabeledImages.__init__(self, "val", min(crop), self._square.seed)
        self._crop_size, self.source, self.classes = crop, source, ()
        self.mean, self.std = self._square.mean, self._square.std

    def __len__(self) -> int:
        return len(self._square)

    @property
    def about(self) -> dict[str, Any]:
        """Return what `Pictures` does, with both sides."""
        return {**super().about, "size": list(self._crop_size)}

    def found(self) -> str:
        """Return what `Pictures` does."""
        return self._square.found()

    def name(self, index: int) -> str:
        """Return an image's name."""
        return self._square.name(index)

    def sample(self, index: int) -> data.Sample:
        """Return image ``index``; raises OSError naming a file that cannot be read."""
        from torchvision.transforms.functional import center_crop

        return {"image": center_crop(self._square.sample(index)["image"], list(self._crop_size)), "label": -1}


class OwnCrops(data.Pictures):
    """Crops of a pose run's validation data, in true boxes.

    Args:
        source: name of the data set.
        options: those of the run.
        crop: (height, width) of the crops.
        count: number of crops; a seeded choice if there are more. None: all of them.
        seed: of the choice.
    """

    def __init__(
        self,
        source: str,
        options: Mapping[str, Any],
        crop: tuple[int, int],
        count: int | None,
        seed: int,
    ) -> None:
        data.LabeledImages.__init__(self, "val", min(crop), seed)
        whole: Any = data.create(source, "val", **{**with_true_boxes(options), "crop_size": list(crop)})
        self._whole, self.source, self.classes = whole, source, ()
        self._some = Selection(whole, len(whole) if count is None else count, seed)
        self.mean, self.std, self.own_labels = whole.mean, whole.std, "keypoints"

    def __len__(self) -> int:
        return len(self._some)

    @property
    def about(self) -> dict[str, Any]:
        """Return what `Pictures` does, with the size of the crops."""
        return {**super().about, "size": list(self._whole.crop_size)}

    def found(self) -> str:
        """Return the number of crops used, and what the data hold."""
        return f"{len(self):,} of {self.source} {self._whole.found()}"

    def name(self, index: int) -> str:
        """Return the file of a crop."""
        return self._some.name(index)

    def sample(self, index: int) -> data.Sample:
        """Return crop ``index`` with its key points."""
        found = self._some[index]
        if found is None:
            raise OSError(f"{self.name(index)} cannot be read.")
        return {"image": found["image"], "label": -1, "keypoints": found["keypoints"]}
