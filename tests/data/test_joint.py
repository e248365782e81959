"""Joint transforms: images, masks, boxes and key points stay together, by OpenMMLab's rules."""

import colorsys
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate
from torchvision import tv_tensors
from torchvision.transforms import v2

from tolerances import FLOAT32, FLOAT64, close
from widefield.data import joint, seeded
from widefield.data.transforms import JointAugmentation

SIDE = st.integers(1, 70)


def coordinates(height, width):
    """Return an image whose channels are the row, the column and 7, and a mask that depends on both."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows, columns, torch.full_like(rows, 7)]).to(torch.uint8)
    return image, (3 * rows + 5 * columns).remainder(250).to(torch.uint8)


def mask_at(image):
    """Return the mask that belongs to an image of `coordinates`, at its pixels."""
    rows, columns = image[0].long(), image[1].long()
    return (3 * rows + 5 * columns).remainder(250)


@settings(max_examples=60, deadline=None)
@given(SIDE, SIDE, SIDE, SIDE, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 1.0]))
def test_crop_flip_and_padding_keep_image_and_mask_aligned(height, width, rows, columns, seed, hflip):
    image, mask = coordinates(height, width)
    steps = [joint.RandomCrop((rows, columns)), v2.RandomHorizontalFlip(hflip), joint.Pad((rows, columns))]
    with seeded((seed,)):
        result = joint.apply(v2.Compose(steps), {"image": image, "mask": mask, "label": 3})
    assert result["image"].shape == (3, rows, columns)
    assert result["mask"].shape == (rows, columns)
    assert result["label"] == 3
    inside = result["image"][2] == 7
    kept = min(height, rows), min(width, columns)
    assert inside[: kept[0], : kept[1]].all()
    assert inside.sum() == kept[0] * kept[1]  # padding is on the right and at the bottom
    assert torch.equal(result["mask"][inside].long(), mask_at(result["image"])[inside])
    assert (result["mask"][~inside] == 255).all()
    assert (result["image"][:, ~inside] == 0).all()
    assert type(result["mask"]) is torch.Tensor


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), st.integers(0, 2**32 - 1))
def test_resizing_keeps_image_and_mask_aligned(height, width, seed):
    image, _ = coordinates(height, width)
    smooth = image[1].clone()  # the mask of a ramp: its bilinear and nearest values differ by one step at most
    with seeded((seed,)):
        result = joint.apply(joint.RandomResize((120, 90), (0.5, 2.0)), {"image": image, "mask": smooth})
    scale = result["mask"].shape[1] / width
    difference = (result["image"][1].int() - result["mask"].int()).abs().max()
    assert difference <= max(1, math.ceil(1 / scale))
    assert result["image"].shape[1:] == result["mask"].shape


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 3000), st.integers(1, 3000))
def test_an_image_is_fitted_into_the_rectangle_and_keeps_its_ratio(height, width, long, short):
    rows, columns = joint.fitted(height, width, (long, short))
    assert (rows, columns) == joint.fitted(height, width, (short, long))
    assert max(rows, columns) <= max(max(long, short), 1)
    assert min(rows, columns) <= max(min(long, short), 1)
    factor = min(max(long, short) / max(height, width), min(long, short) / min(height, width))
    assert abs(rows - factor * height) <= 0.5 or rows == 1
    assert abs(columns - factor * width) <= 0.5 or columns == 1


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        # mmcv.rescale_size: int(side * factor + 0.5) with the factor of the tighter side.
        ((512, 683), (2048, 512), (512, 683)),
        ((427, 640), (2048, 512), (512, 767)),
        ((640, 427), (2048, 512), (767, 512)),
        ((100, 1000), (2048, 512), (205, 2048)),
        ((1024, 2048), (2048, 1024), (1024, 2048)),
        ((375, 500), (2048, 512), (512, 683)),
    ],
)
def test_sizes_are_those_of_mmcv(size, scale, expected):
    assert joint.fitted(*size, scale) == expected


OPENCV = json.loads((Path(__file__).parents[1] / "fixtures/opencv_resize.json").read_text())["cases"]


@pytest.mark.parametrize("number", range(len(OPENCV)))
def test_resizing_is_that_of_opencv(number):
    case, drawn = OPENCV[number], np.random.Generator(np.random.PCG64(number))
    image = torch.from_numpy(drawn.integers(0, 256, (*case["size"], 3)).astype(np.uint8)).permute(2, 0, 1)
    mask = torch.from_numpy(drawn.integers(0, 150, case["size"]).astype(np.uint8))
    result = joint.apply(joint.Resize(case["scale"]), {"image": image.contiguous(), "mask": mask})
    assert list(result["mask"].shape) == case["resized"]
    assert result["mask"].flatten().tolist() == case["mask"]
    expected = torch.tensor(case["image"]).reshape(*case["resized"], 3).permute(2, 0, 1)
    assert (result["image"].int() - expected).abs().max() <= 1  # of 255 levels: both round, in different arithmetic


def test_bilinear_pixels_are_means_of_the_nearest():
    ramp = torch.tensor([0, 100, 20, 200, 40, 240, 90, 10], dtype=torch.uint8).expand(3, 8, 8).clone()
    result = joint.apply(joint.Resize((4, 4)), {"image": ramp})["image"]
    # cv2.INTER_LINEAR at half size takes the mean of two pixels on each side of the center, here columns 2i and 2i+1.
    assert result[0, 0].tolist() == [50, 110, 140, 50]
    smooth = joint.apply(joint.Resize((4, 4), antialias=True), {"image": ramp})["image"]
    assert not torch.equal(smooth, result)


def test_antialiasing_matters_from_a_factor_of_more_than_two():
    lines = torch.zeros(3, 32, 32, dtype=torch.uint8)
    lines[:, :, ::8] = 255
    plain = joint.apply(joint.Resize((4, 4)), {"image": lines})["image"]
    smooth = joint.apply(joint.Resize((4, 4), antialias=True), {"image": lines})["image"]
    assert plain.max() == 0  # bilinear samples at columns 3 and 4 of every 8 and misses the lines
    assert smooth.min() > 0


def share(mask):
    counts = torch.bincount(mask[mask != 255].long())
    return counts.max() / counts.sum()


def test_crops_show_more_than_one_class_where_that_is_possible():
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[:, 40:] = 1
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    shares = {}
    for ratio in (0.75, 1.0):
        crop = joint.RandomCrop((16, 16), ratio)
        found = []
        for seed in range(200):
            with seeded((seed,)):
                found.append(share(joint.apply(crop, {"image": image, "mask": mask})["mask"]))
        shares[ratio] = (torch.stack(found) >= 0.75).double().mean().item()
    # A crop is mixed at 7 of 49 places: the left edge is in 29..35. All of 11 draws fail with (42/49)^11 = 18 %.
    assert shares[1.0] == pytest.approx(42 / 49, abs=0.08)
    assert shares[0.75] == pytest.approx((42 / 49) ** 11, abs=0.08)


def test_ignored_pixels_do_not_count_for_the_share_of_a_class():
    mask = torch.full((8, 8), 255, dtype=torch.uint8)
    mask[0, :2] = torch.tensor([0, 1])
    crop = joint.RandomCrop((8, 8), 0.75)
    assert crop._is_mixed(mask)
    mask[0, 1] = 0
    assert not crop._is_mixed(mask)
    assert not crop._is_mixed(torch.full((8, 8), 255, dtype=torch.uint8))


def objects():
    """Return a sample with one object, whose box, mask and key points all mark the same rectangle."""
    image, mask = coordinates(20, 30)
    masks = torch.zeros(1, 20, 30, dtype=torch.bool)
    masks[0, 4:10, 6:18] = True
    group = torch.where(masks[0], 1, 255).to(torch.uint8)
    points = torch.tensor([[[6.0, 4.0, 2.0], [17.0, 9.0, 1.0]]])
    boxes = torch.tensor([[6.0, 4.0, 18.0, 10.0]])
    return {"image": image, "mask": mask, "size_group": group, "masks": masks, "boxes": boxes, "keypoints": points}


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 40), st.integers(8, 40), st.integers(0, 2**32 - 1))
def test_boxes_masks_of_objects_and_key_points_follow_the_image(rows, columns, seed):
    steps = [joint.RandomCrop((rows, columns)), v2.RandomHorizontalFlip(), joint.Pad((rows, columns))]
    with seeded((seed,)):
        result = joint.apply(v2.Compose(steps), {**objects(), "labels": torch.tensor([5])})
    inside = result["masks"][0].nonzero()
    x1, y1, x2, y2 = result["boxes"][0].tolist()
    assert result["labels"].tolist() == [5]
    assert torch.equal(result["size_group"] == 1, result["masks"][0])
    if len(inside):
        (top, left), (bottom, right) = inside.amin(0).tolist(), inside.amax(0).tolist()
        assert (x1, y1, x2, y2) == (left, top, right + 1, bottom + 1)
    else:
        assert (x2 - x1) * (y2 - y1) == 0
    points = zip(result["keypoints"][0].tolist(), objects()["keypoints"][0].tolist(), strict=True)
    for (x, y, seen), (was_x, was_y, was_seen) in points:
        inside = 0 <= x < columns and 0 <= y < rows
        assert seen == (was_seen if inside else 0)
        if inside and result["image"][2, int(y), int(x)] == 7:  # not on padding
            assert result["image"][:2, int(y), int(x)].tolist() == [was_y, was_x]
    assert type(result["boxes"]) is torch.Tensor
    assert result["masks"].dtype == torch.bool


def test_resizing_scales_boxes_and_key_points():
    result = joint.apply(joint.Resize((60, 40)), objects())
    assert result["image"].shape == (3, 40, 60)
    close(result["boxes"], torch.tensor([[12.0, 8.0, 36.0, 20.0]]), FLOAT32)
    close(result["keypoints"], torch.tensor([[[12.0, 8.0, 2.0], [34.0, 18.0, 1.0]]]), FLOAT32)
    assert result["masks"].sum() == 4 * objects()["masks"].sum()


def test_photometric_distortion_changes_images_only_and_stays_in_range():
    torch.manual_seed(0)
    image = torch.rand(3, 12, 9)
    distort = joint.PhotometricDistortion()
    changed = 0
    for seed in range(64):
        with seeded((seed,)):
            result = joint.apply(distort, {"image": image, "mask": torch.zeros(12, 9, dtype=torch.uint8)})
        assert result["image"].min() >= 0
        assert result["image"].max() <= 1
        assert not result["mask"].any()
        changed += not torch.equal(result["image"], image)
    assert 54 <= changed <= 64  # 15 of 16 on average: each of four changes has probability 0.5


def distorted(image, **ranges):
    """Return a distortion of ``image`` with fixed changes, over all of the seeds that draw them."""
    off = {"brightness": 0.0, "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": 0.0}
    distort = joint.PhotometricDistortion(**{**off, **ranges})
    found = []
    for seed in range(16):
        with seeded((seed,)):
            found.append(joint.apply(distort, {"image": image})["image"])
    return found


def hsv(image):
    """Return hue in turns, saturation and value of (3, N) by the definition of Smith (1978)."""
    return torch.tensor([colorsys.rgb_to_hsv(*pixel) for pixel in image.T.tolist()]).T


def test_each_distortion_is_the_change_that_it_is_named_after():
    torch.manual_seed(1)
    image = 0.2 + 0.4 * torch.rand(3, 5, 5)
    for result in distorted(image, contrast=(1.2, 1.2)):
        assert min((result - 1.2 * image).abs().max(), (result - image).abs().max()) < 1e-5
    flat = image.reshape(3, -1)
    for name, options, channel, expected in (
        ("saturation", (0.7, 0.7), 1, lambda before: 0.7 * before),
        ("saturation", (1.5, 1.5), 1, lambda before: (1.5 * before).clamp(max=1)),
    ):
        for result in distorted(image, **{name: options}):
            after, before = hsv(result.reshape(3, -1)), hsv(flat)
            want = before.clone()
            want[channel] = expected(before[channel])
            assert min((after - want).abs().max(), (after - before).abs().max()) < 1e-4, name


def test_the_largest_rotation_of_the_hue_is_36_degrees():
    image = torch.tensor([0.8, 0.4, 0.2])[:, None, None].expand(3, 2, 2)
    hues = [hsv(result.reshape(3, -1))[0, 0].item() for result in distorted(image, hue=36.0)]
    turns = [(hue - hsv(image.reshape(3, -1))[0, 0].item() + 0.5) % 1 - 0.5 for hue in hues]
    assert all(abs(turn) <= 0.1 + 1e-4 for turn in turns)
    assert max(map(abs, turns)) > 0.03


@pytest.mark.parametrize("layout", ["planes", "beside"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_images_become_planes_of_floats_with_the_values_of_to_dtype(dtype, layout):
    pixels = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = pixels if dtype == torch.uint8 else pixels.to(dtype) / 255
    pixels = pixels.permute(2, 0, 1)
    pixels = pixels.contiguous() if layout == "planes" else pixels
    sample = {"image": tv_tensors.Image(pixels), "mask": tv_tensors.Mask(pixels[0]), "label": torch.tensor(3)}
    found = joint.ToFloat()(sample)
    expected = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)(sample)
    assert found["image"].dtype == torch.float32
    assert torch.equal(found["image"], expected["image"])
    assert isinstance(found["image"], tv_tensors.Image)
    assert dtype != torch.uint8 or found["image"].is_contiguous()
    assert found["mask"] is sample["mask"]
    assert found["label"] is sample["label"]


def test_the_whole_pipeline_gives_crops_of_one_size_with_padding_0_after_normalization():
    image, mask = coordinates(20, 30)
    augmentation = JointAugmentation(ratio=(0.5, 0.5), photometric=False, cat_max_ratio=1.0)
    transform = joint.training((16, 24), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), augmentation)
    with seeded((0,)):
        result = joint.apply(transform, {"image": image, "mask": mask})
    assert result["image"].shape == (3, 16, 24)
    assert result["image"].dtype == torch.float32
    close(result["image"][2, :10, :15], torch.full((10, 15), (7 / 255 - 0.3) / 0.2), FLOAT32)
    assert not result["image"][:, 10:].any()
    assert not result["image"][:, :, 15:].any()
    assert (result["mask"][10:] == 255).all()
    assert (result["mask"][:10, :15] != 255).all()


def test_two_keys_give_two_samples_and_one_key_gives_one():
    image, mask = coordinates(40, 60)
    transform = joint.training((16, 16), (0.5,) * 3, (0.2,) * 3, JointAugmentation())

    def made(key):
        with seeded(key):
            return joint.apply(transform, {"image": image, "mask": mask})

    first, again, other = made((0, 0, 1)), made((0, 0, 1)), made((0, 1, 1))
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["mask"], again["mask"])
    assert not torch.equal(first["mask"], other["mask"])


def test_other_transforms_of_torchvision_apply_too():
    result = joint.apply(v2.CenterCrop(6), objects())
    assert result["image"].shape == (3, 6, 6)
    assert result["mask"].shape == (6, 6)
    assert isinstance(tv_tensors.Image(result["image"]), tv_tensors.Image)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"cat_max_ratio": 1.5}, ValueError, "cat_max_ratio must be from 0.0 to 1; got 1.5"),
        ({"ratio": (2, 1)}, ValueError, "ratio must be a range"),
        ({"scale": (2048, 0)}, ValueError, "scale must be at least 1; got 0"),
        ({"scale": (1, 2, 3)}, ValueError, r"scale must be .*got \(1, 2, 3\)"),
        ({"photometric": 1}, TypeError, "photometric must be True or False; got 1"),
        ({"antialias": None}, TypeError, "antialias must be True or False; got None"),
        ({"hflip": "no"}, TypeError, "hflip must be a number; got 'no'"),
    ],
)
def test_bad_options_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        JointAugmentation(**options)


@settings(max_examples=60)
@example((1, 45, 42, 87), torch.uint8, 1)
@given(st.tuples(*[st.integers(1, 90)] * 4), st.sampled_from([torch.bool, torch.uint8, torch.int64]), st.integers(0, 3))
def test_masks_are_resized_to_the_nearest_pixel_as_by_pytorch(sides, dtype, count):
    height, width, *size = sides
    masks = torch.randint(2 if dtype == torch.bool else 256, (count, height, width)).to(dtype)
    numbers = masks.float().reshape(1, count, height, width)  # of float64 PyTorch takes some pixels from elsewhere
    expected = interpolate(numbers, size, mode="nearest")[0] if count else torch.zeros(0, *size)
    found = joint.nearest(masks, size)
    assert found.dtype == dtype
    assert torch.equal(found.float(), expected)
    assert torch.equal(
        joint.nearest(masks.sum(0).to(dtype), size), joint.nearest(masks.sum(0).to(dtype)[None], size)[0]
    )


def test_images_given_as_floats_are_not_normalized_in_place():
    image = torch.rand(3, 7, 5)
    before = image.clone()
    for scale in (None, (9, 4)):
        joint.apply(joint.evaluation(scale, (0.5,) * 3, (0.2,) * 3), {"image": image})
        assert torch.equal(image, before)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 1 / 6, 0.3])
def test_the_hue_is_that_of_the_definition(turn):
    """Grays, pure colors, and colors with two equal channels are there, too."""
    values = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    flat = torch.cartesian_prod(values, values, values).T
    image = tv_tensors.Image(flat.reshape(3, 8, 8))
    changed = joint.PhotometricDistortion().transform(image, {"changes": {"hue": turn}})
    expected = []
    for pixel in flat.T.tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
    close(changed.reshape(3, -1), torch.tensor(expected, dtype=torch.float64).T, FLOAT64)
