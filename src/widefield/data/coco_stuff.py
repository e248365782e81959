"""Read COCO-Stuff 164k (Caesar et al. 2018): the images of COCO 2017 with things and stuff."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from widefield._pixels import IGNORED
from widefield.data.labels import LabelFormat, published, values_of
from widefield.data.mask_files import SegmentationFiles
from widefield.data.pairs import pair_up, root_of

_LAYOUT = "Expected root/images/{train2017,val2017}/*.jpg and root/annotations/{train2017,val2017}/*.png."
_CONVERTED = "_labelTrainIds"
_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
"""Values of the published label images, from 0 to 181, that COCO never used: its ids are one larger."""


class CocoStuff(SegmentationFiles):
    """COCO-Stuff 164k: 118,287 images for train, 5,000 for val, 171 classes, of which the first 80 are things.

    The label images are the published ones, ``000000000009.png`` with 0 to 181 (COCO's ids minus 1), or converted ones,
    ``000000000009_labelTrainIds.png`` with 0 to 170. A folder that holds converted ones is read through these. The set
    has no official colors; these are `default_palette`'s from 1.

    Args:
        split: ``"train"`` or ``"val"``.
        root: the folder that holds ``images`` and ``annotations``.
        scale: see `JointAugmentation`; published results come from (2048, 512).
        options: those of `SegmentationFiles`, such as ``size`` and ``test_scale``.

    Raises:
        FileNotFoundError: a folder, an image or a label image is missing.
        ValueError, TypeError: an argument is out of range, unknown, or of the wrong type.
    """

    needs: ClassVar[dict[str, str]] = {"root": "the folder that holds images and annotations"}

    def __init__(
        self, split: str, *, root: str | Path, scale: Sequence[int] | None = (2048, 512), **options: Any
    ) -> None:
        super().__init__(split, scale=scale, **options)
        folder = root_of(root, "coco_stuff164k", "images", _LAYOUT)
        part = f"{split}2017"
        converted = any(folder.glob(f"annotations/{part}/*{_CONVERTED}.png"))
        pairs = pair_up(
            folder,
            f"images/{part}",
            f"annotations/{part}",
            label_suffix=_CONVERTED if converted else "",
            layout=_LAYOUT,
        )
        names, palette = published("coco_stuff")
        values = values_of(len(names)) if converted else published_values()
        self._hold(pairs, names, palette, LabelFormat(values, hint="Take the label images of COCO-Stuff 164k."))


def published_values() -> dict[int, int]:
    """Return value in the published label images -> class, or 255 for pixels without a class."""
    used = [value for value in range(182) if value not in _UNUSED]
    return {value: index for index, value in enumerate(used)} | {IGNORED: IGNORED}
