"""Train crops: what each step does, and how often, against the published rules."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tolerances import FLOAT64, close
from widefield.data import Skeleton, crops
from widefield.data.pose_augmentation import CropSampler
from widefield.data.transforms import PoseAugmentation

COCO = Skeleton.load("coco")
SIZE = (256, 192)
WIDTH = 640
BOX = np.array([100.0, 50.0, 220.0, 290.0])
OFF = {"hflip": 0, "half_body_prob": 0, "shift_prob": 0, "scale_prob": 0, "rotate_prob": 0}
DRAWS = 2000


def person(labeled=range(17)):
    """Return the key points of a person who fills the box, with labels at some of them."""
    points = np.zeros((17, 3))
    points[:, 0] = np.linspace(105, 215, 17)
    points[:, 1] = 60 + 220 * (np.arange(17) >= 11) * np.linspace(0.6, 1, 17) + np.arange(17)
    points[list(labeled), 2] = 2
    return points


def drawn(skeleton=COCO, points=None, udp=False, draws=DRAWS, **options):
    """Return the matrices of many crops, (N, 2, 3), and which of them mirror."""
    sampler = CropSampler(PoseAugmentation(**{**OFF, **options}), skeleton, SIZE, 1.25, udp=udp)
    points = person() if points is None else points
    found = [sampler.draw(np.random.default_rng(seed), BOX, points, WIDTH) for seed in range(draws)]
    return torch.stack([matrix for matrix, _ in found]), np.array([flipped for _, flipped in found])


def plain(udp=False):
    return crops.crop_matrix(*crops.crop_box(torch.from_numpy(BOX), SIZE), SIZE, udp=udp)


def share(events):
    return float(np.mean(np.asarray(events)))


@pytest.mark.parametrize("udp", [False, True])
def test_without_any_step_crops_are_those_of_val(udp):
    matrices, flipped = drawn(udp=udp, draws=3)
    assert not flipped.any()
    close(matrices[2], plain(udp), FLOAT64)


def test_flips_mirror_the_image_around_its_center():
    matrices, flipped = drawn(hflip=0.5)
    assert abs(share(flipped) - 0.5) < 0.04
    box = torch.tensor([WIDTH - 1 - BOX[2], BOX[1], WIDTH - 1 - BOX[0], BOX[3]])
    expected = crops.mirrored(crops.crop_matrix(*crops.crop_box(box, SIZE), SIZE), WIDTH)
    close(matrices[flipped][0], expected, FLOAT64)
    close(matrices[~flipped][0], plain(), FLOAT64)


def cut_off_variance():
    """Return the variance of a standard normal distribution that is cut off at -1 and 1."""
    density = np.exp(-0.5) / np.sqrt(2 * np.pi)
    return 1 - 2 * density / 0.6826894921370859


def test_scales_are_cut_off_normal_numbers_around_one():
    matrices, _ = drawn(scale_prob=1.0)
    factors = (plain()[0, 0] / matrices[:, 0, 0]).numpy()
    assert factors.min() >= 0.5
    assert factors.max() <= 1.5
    assert abs(factors.mean() - 1) < 0.03
    assert abs(factors.var() - cut_off_variance() / 4) < 0.01
    matrices, _ = drawn(scale_prob=0.25, scale_factor=(0.8, 2.0))
    changed = (matrices[:, 0, 0] - plain()[0, 0]).abs() > 1e-9
    assert abs(share(changed) - 0.25) < 0.04
    factors = (plain()[0, 0] / matrices[changed][:, 0, 0]).numpy()
    assert abs(factors.mean() - 1.4) < 0.06


def test_rotations_are_around_the_center_of_the_box():
    matrices, _ = drawn(rotate_prob=0.6)
    angles = torch.atan2(matrices[:, 0, 1], matrices[:, 0, 0]).rad2deg()
    assert abs(share(angles != 0) - 0.6) < 0.04
    assert angles.abs().max() <= 80
    assert angles.abs().max() > 75
    assert abs(angles[angles != 0].var() / 80**2 - cut_off_variance()) < 0.03
    center = torch.from_numpy(BOX).reshape(2, 2).mean(0, keepdim=True)
    moved = crops.apply_matrix(center.expand(len(matrices), 1, 2), matrices)
    close(moved, torch.tensor([96.0, 128.0]).double().expand_as(moved), FLOAT64)


def test_shifts_are_in_units_of_the_padded_box():
    """mmpose multiplies by the sides before the aspect is fixed: a narrow box moves less sideways."""
    matrices, _ = drawn(shift_prob=0.3)
    offsets = (plain()[:, 2] - matrices[:, :, 2]) / plain()[0, 0]
    moved = offsets.abs().amax(1) > 1e-9
    assert abs(share(moved) - 0.3) < 0.04
    limits = torch.tensor([120.0, 240.0]).double() * 1.25 * 0.16
    assert (offsets.abs() <= limits).all()
    assert (offsets.abs().amax(0) > 0.9 * limits).all()
    assert abs(share(offsets[moved][:, 0] > 0) - 0.5) < 0.07


def shown_center(matrix):
    """Return the point of the file in the middle of a crop."""
    return crops.apply_matrix(torch.tensor([[96.0, 128.0]]).double(), crops.inverse(matrix))[0]


def halves(points, **options):
    """Return the share of crops of the upper and of the lower half."""
    matrices, _ = drawn(points=points, half_body_prob=1.0, draws=500, **options)
    labeled = points[:, 2] > 0
    found = []
    for part in (COCO.upper, COCO.lower):
        chosen = torch.from_numpy(points[[k for k in part if labeled[k]], :2])
        if not len(chosen):
            found.append(0.0)
            continue
        sides = crops.with_aspect((chosen.amax(0) - chosen.amin(0)) * 1.5, SIZE)
        expected = crops.crop_matrix(chosen.mean(0), sides.clamp_min(1e-3), SIZE)
        found.append(share([bool((matrix - expected).abs().max() < 1e-6) for matrix in matrices]))
    return found


def test_crops_of_half_a_body_surround_its_key_points():
    upper, lower = halves(person())
    assert abs(upper - 0.7) < 0.07
    assert upper + lower == 1


def test_a_half_with_few_labels_is_not_shown_alone():
    assert halves(person(range(13))) == [1, 0]  # two of the lower half
    assert halves(person([0, *range(11, 17)]), min_total_keypoints=7) == [0, 1]
    assert halves(person(range(8))) == [0, 0]  # fewer than nine
    assert halves(person([0, 11, 12]), min_total_keypoints=3) == [0, 0]
    whole, _ = drawn(points=person(range(8)), half_body_prob=1.0, draws=2)
    close(whole[0], plain(), FLOAT64)


def test_key_points_at_one_place_have_no_half():
    points = person()
    points[:, :2] = 150.0
    matrices, _ = drawn(points=points, half_body_prob=1.0, draws=20)
    close(matrices, plain().expand_as(matrices), FLOAT64)


def test_the_probability_of_half_a_body_and_things_without_halves():
    matrices, _ = drawn(half_body_prob=0.3)
    assert abs(share((matrices - plain()).abs().amax((1, 2)) > 1e-9) - 0.3) < 0.04
    scenes = Skeleton.load("scenes")
    points = person()[:5]
    matrices, _ = drawn(skeleton=scenes, points=points, half_body_prob=1.0, min_total_keypoints=1, draws=5)
    close(matrices, plain().expand_as(matrices), FLOAT64)


def test_a_flipped_half_is_that_of_the_mirrored_person():
    """The names left and right change places, the halves do not."""
    points = person(range(11))
    matrices, flipped = drawn(points=points, half_body_prob=1.0, hflip=1, draws=4)
    assert flipped.all()
    chosen = torch.from_numpy(points[:11, :2])
    close(shown_center(matrices[0]), chosen.mean(0), 1e-9)


@settings(max_examples=60, deadline=None)
@given(
    box=st.tuples(*[st.floats(-50, 600)] * 2, *[st.floats(0.01, 600)] * 2),
    points=st.lists(st.tuples(st.floats(-900, 900), st.floats(-900, 900), st.sampled_from([0, 1, 2])), min_size=17,
                    max_size=17),
    seed=st.integers(0, 2**32),
    udp=st.booleans(),
)  # fmt: skip
def test_any_person_has_a_crop(box, points, seed, udp):
    left, top, width, height = box
    sampler = CropSampler(PoseAugmentation(half_body_prob=0.9), COCO, SIZE, 1.25, udp=udp)
    edges = np.array([left, top, left + width, top + height])
    matrix, flipped = sampler.draw(np.random.default_rng(seed), edges, np.array(points, float), WIDTH)
    determinant = float(torch.linalg.det(matrix[:, :2]))
    assert torch.isfinite(matrix).all()
    assert determinant < 0 if flipped else determinant > 0
    close(crops.apply_matrix(shown_center(matrix)[None], matrix)[0], torch.tensor([96.0, 128.0]).double(), 1e-6)
