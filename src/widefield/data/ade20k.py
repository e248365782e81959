"""Read ADE20K's scene parsing benchmark, ``ADEChallengeData2016`` (Zhou et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from widefield.data.labels import LabelFormat, published, values_of
from widefield.data.mask_files import SegmentationFiles
from widefield.data.pairs import pair_up, root_of

_LAYOUT = "Expected root/images/{training,validation}/*.jpg and root/annotations/{training,validation}/*.png."
_PARTS = {"train": "training", "val": "validation"}


class Ade20k(SegmentationFiles):
    """ADE20K's scene parsing benchmark: 20,210 images for train, 2,000 for val, 150 classes.

    In its label images 0 means no class; it is ignored, and 1 to 150 become the classes 0 to 149.

    Args:
        split: ``"train"`` or ``"val"``.
        root: the folder ``ADEChallengeData2016``, or the one that holds it.
        scale: see `JointAugmentation`; published results come from (2048, 512).
        options: those of `SegmentationFiles`, such as ``size`` and ``test_scale``.

    Raises:
        FileNotFoundError: a folder, an image or a label image is missing.
        ValueError, TypeError: an argument is out of range, unknown, or of the wrong type.
    """

    needs: ClassVar[dict[str, str]] = {"root": "the folder ADEChallengeData2016"}

    def __init__(
        self, split: str, *, root: str | Path, scale: Sequence[int] | None = (2048, 512), **options: Any
    ) -> None:
        super().__init__(split, scale=scale, **options)
        folder = root_of(root, "ADEChallengeData2016", "images", _LAYOUT)
        part = _PARTS[split]
        pairs = pair_up(folder, f"images/{part}", f"annotations/{part}", layout=_LAYOUT)
        names, palette = published("ade20k")
        values = values_of(len(names), reduce_zero_label=True)
        self._hold(pairs, names, palette, LabelFormat(values, hint="Take the label images of ADEChallengeData2016."))
