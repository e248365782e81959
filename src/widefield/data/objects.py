"""Provide the base class of sets for object detection: images with boxes, classes and masks of objects."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

from widefield.data.base import SampleSet
from widefield.data.segmentation import Color


class DetectionSet(SampleSet):
    """Images with objects; a subclass defines ``__len__``, ``sample`` and the attributes.

    Samples, for M objects, which may be none:

    - ``image`` float32 (C, h, w), normalized by ``mean`` and ``std``, of any size and not padded.
    - ``boxes`` float32 (M, 4): the edges (left, top, right, bottom) in continuous pixels, (0, 0) being the top left
      corner of the image. In the train split they are in pixels of ``image``, in the val split in pixels of the file.
    - ``labels`` int64 (M,): an index into ``object_classes``.
    - ``crowd`` bool (M,): the entry is a crowd region, a group of objects without a box for each. Detections in it
      count neither as right nor as wrong.
    - ``area`` float32 (M,): the area in pixels of the same image as ``boxes``, by which metrics divide objects by size:
      that of the mask if the set knows it.
    - ``masks`` bool (M, H, W), only if the set has masks: the pixels of each object, at the size that ``boxes`` refer
      to.
    - ``size`` int64 (2,): (height, width) of the file, in pixels.
    - any further entries of the set.

    Attributes:
        object_classes: names of the objects' classes, without a background; the same as ``classes``.
        palette: color of each class in figures, (red, green, blue) from 0 to 255.
        has_masks: whether samples have ``masks``.
        test_scale: (longer side, shorter side) of the rectangle that val images are fitted into; None: they keep the
            size of the file.
    """

    palette: tuple[Color, ...] = ()
    has_masks: bool = False
    test_scale: tuple[int, int] | None = None

    @property
    def object_classes(self) -> tuple[str, ...]:
        """Return the names of the objects' classes."""
        return self.classes


_OKABE_ITO: tuple[Color, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
"""The colors of Okabe and Ito without black, which is lost in dark images."""
_SHADES = (0.0, 0.55, -0.4)
"""How much white (black, if negative) is mixed into the colors, in turn."""


def object_palette(classes: Sequence[str]) -> tuple[Color, ...]:
    """Return a color for each class of objects, as they are drawn into images.

    They are seven colors that color-blind people can tell apart (Okabe and Ito 2008), then lighter and darker shades of
    them. From 22 classes on, colors repeat.
    """
    several = (_shaded(color, amount) for amount in cycle(_SHADES) for color in _OKABE_ITO)
    return tuple(islice(several, len(classes)))


def _shaded(color: Color, amount: float) -> Color:
    end = 255 if amount > 0 else 0
    red, green, blue = (round(value + abs(amount) * (end - value)) for value in color)
    return red, green, blue
