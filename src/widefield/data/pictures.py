"""Provide a few images for analyses: from a folder, from a data set, or from installed packages.

Photographs that packages ship (`widefield.data.photographs`) replace natural images if there are none: random crops of
scikit-learn's two by default, or whole ones by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from widefield import _checks
from widefield.data.base import LabeledImages, MultiLabelImages, Sample, SampleSet, collate, normalize, seeded
from widefield.data.catalog import SETS, create
from widefield.data.decoding import decoding_options, read
from widefield.data.listing import IMAGE_ENDINGS, Skipped, counted, images_in
from widefield.data.objects import DetectionSet
from widefield.data.photo_files import (
    PHOTOGRAPH_NAMES,
    TWO_PHOTOGRAPHS,
    Photograph,
    photograph_names,
    photographs,
)
from widefield.data.poses import PoseSet
from widefield.data.segmentation import SegmentationSet
from widefield.data.transforms import IMAGENET_MEAN, IMAGENET_STD

PHOTOGRAPHS = "photographs"
_WHOLE = f"{PHOTOGRAPHS}:"
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow converts to gray
_DENSE = SegmentationSet, DetectionSet, PoseSet
_UNLABELED = (*_DENSE, MultiLabelImages)
"""Sets whose images have no single label."""
_SMALLEST_CROP = 0.35  # of a photograph's shorter side


class Pictures(LabeledImages):
    """A seeded choice of images (C, size, size), float32 and normalized; files are read when they are needed.

    C is 3, or that of the data set if ``mean`` and ``std`` are not given. Samples: ``image``, ``label`` (-1 without
    classes), and the data set's other entries. Of a set for segmentation: ``image``, ``label`` -1, and ``mask`` of the
    same pixels. Of a set for detection: ``image`` and ``label`` -1.

    Args:
        source: ``"photographs"`` (random crops of scikit-learn's two); ``"photographs:cat,coffee"``, whole photographs
            by name, or ``"photographs:all"`` (see `photographs`); the name of a data set (its validation split); or a
            folder that is searched for images at any depth, links included and hidden folders excluded. Its folders are
            the classes, as in `Folder`, if no file lies outside them. If it has a ``val`` folder, that folder is used.
        count: number of images; a seeded choice if there are more. None: all of them (64 photographs).
        size: side in pixels. Files are resized, so that the shorter side is size / 0.875, and cropped in the center;
            images of a set for segmentation, so that it is ``size``.
        mean, std: of each channel for pixels in [0, 1]. None: ImageNet's, or the data set's own.
        seed: of the choice and the crops.
        exif_orientation, max_pixels: for files in a folder, as in `ImageFiles`.
        options: further options of the data set.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        ModuleNotFoundError: a photograph is asked for whose package is not installed.
        ValueError, TypeError: an argument is out of range or of the wrong type.
    """

    def __init__(
        self,
        source: str | Path = PHOTOGRAPHS,
        *,
        count: int | None = None,
        size: int = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
        exif_orientation: bool = True,
        max_pixels: int | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__("val", size, seed)
        self.source = str(source)
        self.classes = ()
        self._from: SampleSet | None = None
        self._files: list[Path] = []
        self._skipped = Skipped()
        self._photographs: tuple[Photograph, ...] = ()
        self._decoding = decoding_options(exif_orientation, max_pixels)
        own: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET_MEAN, IMAGENET_STD
        if self.source in SETS and (self.source != "folder" or "root" in options):
            sized = {"crop_size" if issubclass(SETS[self.source], PoseSet) else "size": size}
            self._from = create(self.source, "val", **{**sized, **options})
            self.classes = () if isinstance(self._from, _UNLABELED) else self._from.classes
            own = self._from.mean, self._from.std
            available = len(self._from)
        elif options:
            raise TypeError(f"the options {sorted(options)} are for data sets; {self.source!r} takes none.")
        elif self.source == PHOTOGRAPHS:
            available = 64 if count is None else _checks.integer("count", count)
        elif self.source.startswith(_WHOLE):
            self._photographs = photographs(_named(self.source))
            available = len(self._photographs)
        else:
            root, self._files, self._skipped = _files(Path(source).expanduser())
            self.place = str(root)
            if all(path.parent != root for path in self._files):
                self.classes = tuple(sorted({_class(path, root) for path in self._files}))
            available = len(self._files)
        self.mean = tuple(own[0] if mean is None else mean)
        self.std = tuple(own[1] if std is None else std)
        count = available if count is None else min(_checks.integer("count", count), available)
        order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]
        self._chosen: list[int] = order.tolist() if count < available else list(range(available))

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def about(self) -> dict[str, Any]:
        """Return the images' source and preprocessing, to be stored with a result."""
        return {
            "images": len(self),
            "source": self.source,
            "size": self.image_size,
            "mean": [round(v, 4) for v in self.mean],
            "std": [round(v, 4) for v in self.std],
            "seed": self.seed,
        }

    def found(self) -> str:
        """Return one line: the number of images used, the number found, and what was left out and why."""
        if self._from is not None:
            return f"{len(self):,} of {self.source} {self._from.found()}"
        if self._photographs:
            return f"{counted(len(self), 'photograph')}: {', '.join(map(self.name, range(len(self))))}"
        if not self._files:
            return f"{counted(len(self), 'image')} of {self.source}"
        classes = f", {counted(len(self.classes), 'class', 'classes')}" if self.classes else ""
        return f"{len(self):,} of {counted(len(self._files), 'image')} in {self.place}{classes}{self._skipped.clause()}"

    def name(self, index: int) -> str:
        """Return an image's name: its file, or its place in the data set."""
        chosen = self._chosen[index]
        if self._photographs:
            return self._photographs[chosen].name
        return str(self._files[chosen]) if self._files else f"{self.source} {chosen}"

    def sample(self, index: int) -> Sample:
        """Return image ``index``; raises OSError naming a file that cannot be read."""
        chosen = self._chosen[index]
        if self._from is not None:
            found = self._from[chosen]
            if found is None:
                raise OSError(f"{self.source} has no image {chosen}.")
            if isinstance(self._from, _UNLABELED):  # objects and people differ in number from image to image
                found = {name: found[name] for name in ("image", "mask") if name in found}
            if self._from.image_size is None:
                found = _squared(found, self.image_size)
            image = found["image"]
            before = [torch.tensor(v)[:, None, None] for v in (self._from.mean, self._from.std)]
            return {"label": -1, **found, "image": self._normalized(image * before[1] + before[0])}
        if self._files:
            path = self._files[chosen]
            label = self.classes.index(_class(path, Path(self.place))) if self.classes else -1
            return {"image": self._normalized(_center(read(path, **self._decoding), self.image_size)), "label": label}
        if self._photographs:
            picture = Image.fromarray(self._photographs[chosen].pixels.movedim(0, -1).numpy())
            return {"image": self._normalized(_center(picture, self.image_size)), "label": -1}
        return {"image": self._normalized(self._crop(chosen)), "label": -1}

    def _normalized(self, pixels: Tensor) -> Tensor:
        """Normalize pixels (1 or 3, H, W) in [0, 1], with one channel per mean."""
        channels = len(self.mean)
        if len(pixels) == 3 and channels == 1:
            pixels = (pixels * pixels.new_tensor(_LUMA)[:, None, None]).sum(0, keepdim=True)
        return normalize(pixels.expand(channels, -1, -1), self.mean, self.std)

    def _crop(self, index: int) -> Tensor:
        """Return crop ``index`` of one of the two photographs, with random place, side and flip."""
        with seeded((self.seed, index)):
            photograph = photographs(TWO_PHOTOGRAPHS)[index % 2].pixels.movedim(0, -1)
            height, width = photograph.shape[:2]
            side = int(height * (_SMALLEST_CROP + (1 - _SMALLEST_CROP) * torch.rand(()).item()))
            top = int(torch.randint(height - side + 1, ()))
            left = int(torch.randint(width - side + 1, ()))
            flip = bool(torch.rand(()) < 0.5)
        cut = photograph[top : top + side, left : left + side]
        picture = Image.fromarray((cut.flip(1) if flip else cut).numpy())
        return _tensor(picture.resize((self.image_size,) * 2, Image.Resampling.BICUBIC))

    def batches(self, size: int = 32) -> Iterator[Sample]:
        """Yield the samples in order, in batches of ``size``."""
        _checks.integer("size", size)
        for start in range(0, len(self), size):
            yield collate([self[i] for i in range(start, min(start + size, len(self)))])

    def tensor(self) -> Tensor:
        """Return all images as one tensor, (N, C, size, size)."""
        return torch.stack([self.sample(i)["image"] for i in range(len(self))])

    def shown(self, images: Tensor) -> Tensor:
        """Return normalized images (N, C, H, W) as pixels (N, H, W, C) in [0, 1], for figures."""
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1).movedim(1, -1)


def _named(source: str) -> tuple[str, ...]:
    """Return the names of the photographs in a source such as ``photographs:cat,coffee``."""
    words = source.removeprefix(_WHOLE)
    return PHOTOGRAPH_NAMES if words == "all" else photograph_names([word.strip() for word in words.split(",")])


def _class(path: Path, root: Path) -> str:
    return path.relative_to(root).parts[0]


def _files(root: Path) -> tuple[Path, list[Path], Skipped]:
    """Return the folder that was searched, the images in it, and what was left out."""
    if not root.is_dir():
        known = [name for name in (PHOTOGRAPHS, *SETS) if name != "folder"]  # "folder" needs a root
        folders = [str(path) for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
        raise FileNotFoundError(
            f"no folder of images {str(root)!r}.{_checks.did_you_mean(str(root), (*known, *folders))} "
            f"Give a folder, or one of {', '.join(map(repr, known))}."
        )
    if (root / "val").is_dir():
        root = root / "val"
    skipped = Skipped()
    found = sorted(map(Path, images_in(root, skipped)))
    if not found:
        raise FileNotFoundError(f"{str(root)!r} holds no images ({', '.join(IMAGE_ENDINGS)}).{skipped.sentence()}")
    return root, found, skipped


def _center(picture: Image.Image, size: int) -> Tensor:
    """Resize the shorter side to size / 0.875 and crop the center, as networks on ImageNet are evaluated."""
    scale = size / 0.875 / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return _tensor(resized.crop((left, top, left + size, top + size)))


def _squared(sample: Sample, size: int) -> Sample:
    """Return the image and the mask of a sample: the central square, resized to ``size``."""
    from torchvision.transforms.v2 import functional

    image = functional.center_crop(sample["image"], [min(sample["image"].shape[-2:])] * 2)
    squared = {"image": functional.resize(image, [size, size], antialias=True)}
    if "mask" in sample:
        mask = sample["mask"][None, None].float()
        cut = functional.center_crop(mask, [min(mask.shape[-2:])] * 2)
        squared["mask"] = torch.nn.functional.interpolate(cut, [size, size], mode="nearest")[0, 0].long()
    return squared


def _tensor(picture: Image.Image) -> Tensor:
    from torchvision.transforms.functional import pil_to_tensor

    pixels: Tensor = pil_to_tensor(picture)
    return pixels.float() / 255
