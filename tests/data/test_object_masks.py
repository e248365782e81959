"""Masks from polygons and run lengths: bit for bit those of pycocotools."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as reference

from widefield.data.object_masks import POLYGONS, RUNS, Outlines, fifths, runs

# NumPy 2 deprecates how pycocotools 2.0.11 makes arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIDES = st.integers(1, 60)
CORNERS = {
    "hundredths, partly outside": st.floats(-10, 70).map(lambda v: round(v, 2)),
    "whole pixels": st.integers(-3, 60).map(float),
    "halves, often equal": st.integers(0, 12).map(lambda v: v / 2),
}


def single(kind, part, height, width):
    """Return the mask of one object of one part."""
    part = np.array(part, np.int32)
    made = Outlines(np.array([kind], np.uint8), np.array([0, 1]), np.array([0, len(part)]), part)
    return made.masks(0, 1, height, width)[0]


@pytest.mark.parametrize("kind", CORNERS)
@settings(max_examples=100)
@given(data=st.data(), height=SIDES, width=SIDES)
def test_polygons_are_rasterized_as_by_pycocotools(kind, data, height, width):
    points = data.draw(st.lists(CORNERS[kind], min_size=6, max_size=16).filter(lambda v: len(v) % 2 == 0))
    (expected,) = reference.decode(reference.frPyObjects([points], height, width)).transpose(2, 0, 1)
    np.testing.assert_array_equal(single(POLYGONS, fifths(points), height, width), expected.astype(bool))


@settings(max_examples=60)
@given(data=st.data(), height=SIDES, width=SIDES)
def test_objects_of_several_parts_are_united_as_by_pycocotools(data, height, width):
    """Objects are polygons, which may overlap and lie outside of the image, or run lengths; some images have none."""
    corners = st.lists(st.sampled_from(list(CORNERS.values())).flatmap(lambda v: v), min_size=6, max_size=14)
    polygons = st.lists(corners.filter(lambda v: len(v) % 2 == 0), min_size=1, max_size=3)
    objects = data.draw(st.lists(st.one_of(polygons, st.integers(0, 99)), max_size=4))
    kinds, parts, expected = [], [], []
    for one in objects:
        if isinstance(one, int):
            mask = np.random.default_rng(one).random((height, width)) < 0.5
            rle = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
            parts.append([runs({"size": [height, width], "counts": rle["counts"].decode()}, height, width)])
        else:
            mask = reference.decode(reference.merge(reference.frPyObjects(one, height, width)))
            parts.append([np.array(fifths(polygon), np.int32) for polygon in one])
        kinds.append(RUNS if isinstance(one, int) else POLYGONS)
        expected.append(mask.astype(bool))
    values = [part for one in parts for part in one]
    made = Outlines(
        np.array(kinds, np.uint8), np.cumsum([0, *map(len, parts)]), np.cumsum([0, *map(len, values)]),
        np.concatenate([np.zeros(0, np.int32), *values]),
    )  # fmt: skip
    found = made.masks(0, len(objects), height, width)
    assert found.shape == (len(objects), height, width)
    for first in range(len(objects)):  # from any object on
        np.testing.assert_array_equal(made.masks(first, len(objects), height, width), np.stack(expected[first:]))


def decoded(rle, height, width):
    return single(RUNS, runs(rle, height, width), height, width)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32 - 1), height=SIDES, width=SIDES, density=st.floats(0, 1))
def test_run_lengths_are_decoded_as_by_pycocotools(seed, height, width, density):
    mask = np.random.default_rng(seed).random((height, width)) < density
    encoded = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
    compressed = {"size": [height, width], "counts": encoded["counts"].decode()}
    np.testing.assert_array_equal(decoded(compressed, height, width), mask)
    flat = mask.T.reshape(-1)
    counts = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), len(flat)]).tolist()
    plain = {"size": [height, width], "counts": [0, *counts] if flat[0] else counts}
    np.testing.assert_array_equal(decoded(plain, height, width), mask)


def test_long_runs_of_a_large_image_are_decoded():
    mask = np.zeros((1500, 2000), np.uint8, order="F")
    mask[:, 900:1900] = 1
    mask[3, 5] = 1
    counts = reference.encode(mask)["counts"].decode()
    np.testing.assert_array_equal(decoded({"size": [1500, 2000], "counts": counts}, 1500, 2000), mask)


@pytest.mark.parametrize(
    ("rle", "text"),
    [
        ({"counts": [16]}, "the size of its run lengths is None, and the image is"),
        ({"size": [4, 5], "counts": [20]}, r"the size of its run lengths is \[4, 5\], and the image is \[4, 4\]"),
        ({"size": [4, 4]}, "neither integers"),
        ({"size": [4, 4], "counts": [8, 8.0]}, "neither integers"),
        ({"size": [4, 4], "counts": [8, 10**400]}, "neither integers"),
        ({"size": [4, 4], "counts": [20, -4]}, "a run length is negative: -4"),
        ({"size": [4, 4], "counts": [3, 5]}, "add up to 8, and the image has 16 pixels"),
        ({"size": [4, 4], "counts": []}, "add up to 0"),
        ({"size": [4, 4], "counts": ""}, "string of its run lengths is damaged"),
        ({"size": [4, 4], "counts": "@P"}, "string of its run lengths is damaged"),
        ({"size": [4, 4], "counts": "é"}, "string of its run lengths is damaged"),
        ({"size": [4, 4], "counts": "P" * 30 + "0"}, "string of its run lengths is damaged"),
    ],
)
def test_damaged_run_lengths_are_refused(rle, text):
    with pytest.raises(ValueError, match=text):
        runs(rle, 4, 4)
