"""Read Cityscapes (Cordts et al. 2016): street scenes of 2048 x 1024 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from widefield._pixels import IGNORED
from widefield.data.labels import LabelFormat, published, values_of
from widefield.data.mask_files import SegmentationFiles
from widefield.data.pairs import pair_up, root_of

_LAYOUT = (
    "Expected root/leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and root/gtFine/{train,val}/<city>/"
    "*_gtFine_labelIds.png (or *_gtFine_labelTrainIds.png)."
)
_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The id of each of the 19 classes, of 34 ids that label images hold; the others do not count in the benchmark."""


class Cityscapes(SegmentationFiles):
    """Cityscapes with fine labels: 2,975 images for train, 500 for val, the 19 classes of the benchmark.

    The label images are the published ones, ``*_labelIds.png``. If all images have one, ``*_labelTrainIds.png`` of the
    official scripts is read instead; the masks are the same.

    Args:
        split: ``"train"`` or ``"val"``.
        root: the folder that holds ``leftImg8bit`` and ``gtFine``.
        size: see `SegmentationFiles`; published results come from (512, 1024), or 769 for RepLKNet.
        scale: see `JointAugmentation`; published results come from (2048, 1024).
        options: those of `SegmentationFiles`, such as ``test_scale``.

    Raises:
        FileNotFoundError: a folder, an image or a label image is missing.
        ValueError, TypeError: an argument is out of range, unknown, or of the wrong type.
    """

    needs: ClassVar[dict[str, str]] = {"root": "the folder that holds leftImg8bit and gtFine"}

    def __init__(
        self,
        split: str,
        *,
        root: str | Path,
        size: int | Sequence[int] = (512, 1024),
        scale: Sequence[int] | None = (2048, 1024),
        **options: Any,
    ) -> None:
        super().__init__(split, size=size, scale=scale, **options)
        folder = root_of(root, "cityscapes", "leftImg8bit", _LAYOUT)
        images, labels = f"leftImg8bit/{split}", f"gtFine/{split}"

        def count(pattern: str) -> int:
            return sum(1 for _ in folder.glob(pattern))

        converted = count(f"{labels}/*/*_labelTrainIds.png") >= count(f"{images}/*/*.png") > 0
        pairs = pair_up(
            folder,
            images,
            labels,
            image_suffix="_leftImg8bit",
            label_suffix="_gtFine_labelTrainIds" if converted else "_gtFine_labelIds",
            layout=_LAYOUT,
        )
        names, palette = published("cityscapes")
        values = values_of(len(names)) if converted else published_values()
        self._hold(pairs, names, palette, LabelFormat(values, hint="Take the label images of gtFine."))


def published_values() -> dict[int, int]:
    """Return id in ``*_labelIds.png`` -> class, or 255 for ids that do not count."""
    return dict.fromkeys(range(34), IGNORED) | {value: index for index, value in enumerate(_IDS)}
