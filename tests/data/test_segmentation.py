"""The base class of segmentation sets."""

import pytest
import torch

from widefield.data import SegmentationSet, default_palette


class Two(SegmentationSet):
    classes = ("sky", "sea")

    def __len__(self):
        return 3

    def sample(self, index):
        return {"image": torch.zeros(3, 4, 5), "mask": torch.full((4, 5), index)}


def test_a_set_of_ones_own_needs_only_samples_and_classes():
    data = Two("val", 0)
    assert data.found() == "val: 3 images, 2 classes"
    assert (data.ignore_index, data.size_groups, data.palette, data.crop_size) == (255, (), (), None)
    assert data.image_shape is None
    assert data[-1]["mask"].unique().tolist() == [2]


def test_the_default_palette_is_that_of_pascal_voc():
    colors = default_palette(256)
    # Stated in the development kit of VOC 2012, with white-ish (224, 224, 192) for the border, index 255.
    assert colors[:5] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert (colors[8], colors[20], colors[255]) == ((64, 0, 0), (0, 64, 128), (224, 224, 192))
    assert len(set(colors)) == 256


def test_a_palette_has_at_most_256_colors():
    with pytest.raises(ValueError, match="count must be from 0 to 256; got 257"):
        default_palette(257)
