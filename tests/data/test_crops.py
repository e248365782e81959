"""Crops of boxes: published matrices, an oracle of bilinear sampling, and OpenCV's pixels."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tolerances import FLOAT32, FLOAT64, close
from widefield.data import crops

CASES = json.loads((Path(__file__).parents[1] / "fixtures/opencv_warp.json").read_text())["cases"]


def case_image(number):
    pixels = np.random.Generator(np.random.PCG64(number)).integers(0, 256, (*CASES[number]["size"], 3))
    return torch.from_numpy(pixels.astype(np.uint8)).permute(2, 0, 1).contiguous()


def sampled(image, matrix, size):
    """Sample an image bilinearly, pixel by pixel in float64; outside is 0."""
    channels, height, width = image.shape
    whole = np.vstack([torch.as_tensor(matrix, dtype=torch.float64).numpy(), [0, 0, 1]])
    back = np.linalg.inv(whole)[:2]
    values = image.double().numpy()
    result = np.zeros((channels, *size))
    for row in range(size[0]):
        for column in range(size[1]):
            x, y = back @ (column, row, 1)
            left, top = math.floor(x), math.floor(y)
            for i, j in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                if 0 <= i < height and 0 <= j < width:
                    result[:, row, column] += (1 - abs(x - j)) * (1 - abs(y - i)) * values[:, i, j]
    return torch.from_numpy(result)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_pixels_are_those_of_opencv(number):
    case, image = CASES[number], case_image(number)
    crop = crops.warp(image, torch.tensor([case["matrix"]]).double(), case["crop"])[0]
    assert crop.dtype == torch.uint8
    for version, levels, share in (("opencv5", 1, 0.02), ("opencv4", 5, 1.0)):
        expected = torch.tensor(case[version]).reshape(*case["crop"], 3).permute(2, 0, 1)
        differences = (crop.int() - expected).abs()
        assert differences.max() <= levels
        assert (differences > 0).float().mean() <= share  # both round halves, in different arithmetic


@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, 10 * FLOAT32)])
def test_pixels_are_those_of_the_oracle(number, dtype, tolerance):
    """In float32 positions are rounded to a ten-thousandth of a pixel, on noise of full contrast."""
    case, image = CASES[number], case_image(number)
    matrix = torch.tensor([case["matrix"]], dtype=torch.float64)
    close(
        crops.warp(image.to(dtype), matrix, case["crop"])[0],
        sampled(image, case["matrix"], case["crop"]).to(dtype),
        tolerance,
    )


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    crop=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    center=st.tuples(st.floats(-12, 20), st.floats(-12, 20)),
    scale=st.floats(0.5, 30),
    rotation=st.floats(-180, 180),
    udp=st.booleans(),
)
def test_any_crop_is_that_of_the_oracle(size, crop, center, scale, rotation, udp):
    image = torch.rand(2, *size, dtype=torch.float64)
    crop = tuple(side + 1 for side in crop)  # udp needs two pixels
    sides = crops.with_aspect(torch.tensor([[scale, scale]]), crop)
    matrix = crops.crop_matrix(torch.tensor([center]).double(), sides, crop, rotation, udp=udp)
    close(crops.warp(image, matrix, crop)[0], sampled(image, matrix[0], crop), FLOAT64)


def test_several_crops_are_those_of_each_alone():
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    boxes = torch.tensor([[3.0, 4.0, 20.0, 39.0], [-30.0, 5.0, 8.0, 12.0], [70.0, 70.0, 90.0, 80.0]])
    matrices = crops.crop_matrix(*crops.crop_box(boxes, (32, 24)), (32, 24), torch.tensor([0.0, 30.0, -5.0]))
    together = crops.warp(image, matrices, (32, 24))
    assert together.shape == (3, 3, 32, 24)
    for one, matrix in zip(together, matrices, strict=True):
        assert (one.int() - crops.warp(image, matrix[None], (32, 24))[0].int()).abs().max() <= 1
    assert not together[2].any()
    assert together[0].any()
    assert crops.warp(image, matrices[:0], (32, 24)).shape == (0, 3, 32, 24)


def test_a_crop_of_the_size_of_its_box_is_a_slice():
    image = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8)
    box = torch.tensor([[5.0, 6.0, 17.0, 22.0]])
    matrix = crops.crop_matrix(*crops.crop_box(box, (16, 12), padding=1), (16, 12))
    assert torch.equal(crops.warp(image, matrix, (16, 12))[0], image[:, 6:22, 5:17])


def test_gradients_reach_the_image():
    image = torch.rand(1, 5, 6, dtype=torch.float64, requires_grad=True)
    matrix = crops.crop_matrix(torch.tensor([[2.6, 2.2]]), torch.tensor([[4.0, 4.0]]), (3, 3), 20)
    assert torch.autograd.gradcheck(lambda x: crops.warp(x, matrix, (3, 3)), (image,))


@settings(max_examples=50, deadline=None)
@given(
    box=st.tuples(*[st.floats(-50, 50)] * 2, *[st.floats(0.1, 80)] * 2),
    padding=st.floats(0.5, 2),
    rotation=st.floats(-180, 180),
    udp=st.booleans(),
)
def test_the_box_fills_the_crop(box, padding, rotation, udp):
    """Its center is that of the crop, one pair of its padded edges the border, and points come back."""
    left, top, width, height = box
    size = (64, 48)
    edges = torch.tensor([left, top, left + width, top + height], dtype=torch.float64)
    center, scale = crops.crop_box(edges, size, padding)
    matrix = crops.crop_matrix(center, scale, size, udp=udp)
    low, high = center - padding * (edges[2:] - edges[:2]) / 2, center + padding * (edges[2:] - edges[:2]) / 2
    moved = crops.apply_matrix(torch.stack([center, low, high]), matrix)
    sides = torch.tensor([47.0, 63.0]) if udp else torch.tensor([48.0, 64.0])
    close(moved[0], sides.double() / 2, FLOAT64 * 1e3)  # 80 pixels in the crop may be 0.1 in the file
    shares = (moved[2] - moved[1]) / sides
    assert 1 - 1e-6 < shares.max() < 1 + 1e-6
    turned = crops.crop_matrix(center, scale, size, rotation, udp=udp)
    points = torch.rand(4, 2, dtype=torch.float64) * 100
    back = crops.apply_matrix(crops.apply_matrix(points, turned), crops.inverse(turned))
    close(back, points, FLOAT64 * 1e3)


def test_rotations_turn_the_content():
    center, scale = torch.tensor([[10.0, 20.0]]), torch.tensor([[48.0, 64.0]])
    right = torch.tensor([[11.0, 20.0]])
    offsets = {}
    for udp in (False, True):
        matrix = crops.crop_matrix(center, scale, (64, 48), torch.tensor([90.0]), udp=udp)
        offsets[udp] = crops.apply_matrix(right, matrix)[0, 0] - crops.apply_matrix(center, matrix)[0, 0]
    close(offsets[False], torch.tensor([0.0, -1.0]), FLOAT32)  # counterclockwise: the right end goes up
    close(offsets[True], torch.tensor([0.0, 63 / 64]), FLOAT32)  # clockwise


def test_a_mirrored_crop_is_the_crop_of_the_mirrored_image():
    image = torch.randint(0, 256, (3, 31, 45), dtype=torch.uint8)
    matrix = crops.crop_matrix(torch.tensor([[12.3, 14.1]]), torch.tensor([[21.0, 28.0]]), (32, 24), 17.0)
    expected = crops.warp(image.flip(2), matrix, (32, 24))
    found = crops.warp(image, crops.mirrored(matrix, 45), (32, 24))
    assert (found.int() - expected.int()).abs().max() <= 1  # halves are rounded after other products
    assert found.any()


def test_points_keep_their_dtype_and_batches():
    matrix = crops.crop_matrix(torch.rand(2, 3, 2), torch.rand(2, 3, 2) + 1, (8, 6))
    assert matrix.shape == (2, 3, 2, 3)
    assert matrix.dtype == torch.float64
    points = torch.rand(2, 3, 5, 2)
    moved = crops.apply_matrix(points, matrix)
    assert moved.shape == points.shape
    assert moved.dtype == torch.float32
    close(crops.apply_matrix(moved, crops.inverse(matrix)), points, FLOAT32)


def test_what_cannot_be_cropped_is_refused():
    with pytest.raises(ValueError, match=r"image must be \(C, H, W\); got shape \(1, 3, 4, 4\)"):
        crops.warp(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 3), (2, 2))
    with pytest.raises(ValueError, match=r"matrices must be \(M, 2, 3\); got shape \(2, 3\)"):
        crops.warp(torch.zeros(3, 4, 4), torch.zeros(2, 3), (2, 2))
    with pytest.raises(ValueError, match=r"scale must be above 0, .*got 0"):
        crops.crop_matrix(*crops.crop_box(torch.tensor([[3.0, 4.0, 3.0, 4.0]]), (8, 6)), (8, 6))
    with pytest.raises(ValueError, match="a side of size must be at least 1; got 0"):
        crops.warp(torch.zeros(3, 4, 4), torch.zeros(1, 2, 3), (0, 2))
