"""Read Pascal VOC 2012's segmentation (Everingham et al. 2015), and its extension SBD (Hariharan et al. 2011)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from widefield.data.labels import LabelFormat, published, values_of
from widefield.data.listing import Skipped
from widefield.data.mask_files import SegmentationFiles
from widefield.data.pairs import Pairs, check_files, root_of

_LAYOUT = (
    "Expected root/JPEGImages/*.jpg, root/SegmentationClass/*.png and root/ImageSets/Segmentation/{train,val}.txt."
)
_LISTS = "ImageSets/Segmentation"
_AUGMENTED = "SegmentationClassAug"


class Voc(SegmentationFiles):
    """Pascal VOC 2012: 1,464 images for train, 1,449 for val, 20 classes of objects and the background.

    The label images have palettes; 255, the border around objects, is ignored.

    Args:
        split: ``"train"`` or ``"val"``.
        root: the folder ``VOC2012``, or one that holds ``VOCdevkit/VOC2012`` or ``VOC2012``.
        augmented: train with the 10,582 images of SBD. Their label images are in ``SegmentationClassAug``, and their
            names in ``trainaug.txt``, or in ``train.txt`` and ``aug.txt``. Images without a label image there are read
            from ``SegmentationClass``.
        scale: see `JointAugmentation`; published results come from (2048, 512).
        options: those of `SegmentationFiles`, such as ``size`` and ``test_scale``.

    Raises:
        FileNotFoundError: a folder, an image or a label image is missing.
        ValueError, TypeError: an argument is out of range, unknown, or of the wrong type.
    """

    needs: ClassVar[dict[str, str]] = {"root": "the folder VOC2012, or VOCdevkit"}

    def __init__(
        self,
        split: str,
        *,
        root: str | Path,
        augmented: bool = False,
        scale: Sequence[int] | None = (2048, 512),
        **options: Any,
    ) -> None:
        super().__init__(split, scale=scale, **options)
        inner = "VOC2012" if (Path(root).expanduser() / "VOC2012").is_dir() else "VOCdevkit/VOC2012"
        folder = root_of(root, inner, _LISTS, _LAYOUT)
        extended = bool(augmented) and split == "train"
        stems = _train_of_sbd(folder) if extended else _listed(folder, f"{split}.txt")
        images = [f"JPEGImages/{stem}.jpg" for stem in stems]
        extra = {path.stem for path in (folder / _AUGMENTED).glob("*.png")} if extended else set()
        labels = [f"{_AUGMENTED if stem in extra else 'SegmentationClass'}/{stem}.png" for stem in stems]
        check_files(folder, images, "images", _LAYOUT)
        hint = f"Label images of SBD belong into {_AUGMENTED}." if extended else _LAYOUT
        check_files(folder, labels, "label images", hint)
        names, palette = published("voc")
        form = LabelFormat(values_of(len(names)), form="palette", hint="Take the label images of VOC 2012.")
        self._hold(Pairs(folder, images, labels, Skipped()), names, palette, form)


def _listed(folder: Path, name: str) -> list[str]:
    """Return the names of images in one of VOC's lists, without duplicates; raises FileNotFoundError."""
    path = folder / _LISTS / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no list of images {str(path)!r}. {_LAYOUT}")
    stems = list(
        dict.fromkeys(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    )
    if not stems:
        raise FileNotFoundError(f"the list of images {str(path)!r} is empty. {_LAYOUT}")
    return stems


def _train_of_sbd(folder: Path) -> list[str]:
    """Return the names of VOC's train images and those of SBD."""
    if (folder / _LISTS / "trainaug.txt").is_file():
        return _listed(folder, "trainaug.txt")
    return list(dict.fromkeys([*_listed(folder, "train.txt"), *_listed(folder, "aug.txt")]))
