"""Provide the base class of sets for semantic segmentation: images with a class at every pixel."""

from __future__ import annotations

from widefield import _checks
from widefield._pixels import IGNORED
from widefield.data.base import SampleSet

Color = tuple[int, int, int]
"""(red, green, blue), each from 0 to 255."""


class SegmentationSet(SampleSet):
    """Images with a class at every pixel; a subclass defines ``__len__``, ``sample`` and the attributes.

    Samples:

    - ``image`` float32 (C, h, w), normalized by ``mean`` and ``std``.
    - ``mask`` int64 (H, W): an index into ``classes``, or ``ignore_index``, for each pixel. In the train split its size
      is that of the image. In the val split it may be larger or smaller: the image has the size that the model sees,
      the mask the size of the file.
    - ``size_group`` uint8 (H, W), only with ``size_groups``: an index into them for each pixel of an object, 255
      elsewhere.
    - any further entries of the set.

    Attributes:
        palette: color of each class in figures, (red, green, blue) from 0 to 255.
        ignore_index: value of mask pixels that count neither in the loss nor in the metrics.
        size_groups: names of the groups of objects by size, such as ``("small", "large")``; empty if sizes are unknown.
        crop_size: (height, width) of the train images in pixels; None if they differ.
        test_scale: (longer side, shorter side) of the rectangle that val images are fitted into; None: they keep the
            size of the file.
    """

    palette: tuple[Color, ...] = ()
    ignore_index: int = IGNORED
    size_groups: tuple[str, ...] = ()
    crop_size: tuple[int, int] | None = None
    test_scale: tuple[int, int] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Return (C, H, W) of the images, or None if they differ in size."""
        if self.split == "train" and self.crop_size is not None:
            return (len(self.mean), *self.crop_size)
        return super().image_shape


def default_palette(count: int) -> tuple[Color, ...]:
    """Return a color for each of ``count`` classes: the color map of Pascal VOC, whose first color is black.

    The bits of the class index, from the lowest, go in turn to red, green and blue, each filled from its highest bit.
    Raises TypeError or ValueError unless ``count`` is an integer from 0 to 256.
    """

    def channel(index: int, first: int) -> int:
        return sum(((index >> (3 * step + first)) & 1) << (7 - step) for step in range(8))

    count = _checks.integer("count", count, minimum=0, maximum=256)
    return tuple((channel(i, 0), channel(i, 1), channel(i, 2)) for i in range(count))
