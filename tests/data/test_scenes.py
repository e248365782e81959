import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from finding import places

from widefield.data import Scenes
from widefield.data.drawing import KEYPOINTS, KEYPOINTS_FLIPPED, OUTLINES, POINTS

TENSORS = ("image", "mask", "size_group", "labels", "masks", "boxes", "keypoints", "sides", "area", "crowd", "size")


@pytest.fixture(scope="module")
def val() -> Scenes:
    return Scenes("val", count=200)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in TENSORS)


def pixels(data: Scenes, sample: dict) -> torch.Tensor:
    return (sample["image"] * data.std[0] + data.mean[0]).mul(255).round().to(torch.uint8)


def test_a_sample_has_the_promised_form(val):
    sample = val[3]
    m = len(sample["labels"])
    assert m > 3
    forms = {
        "image": ((3, 128, 128), torch.float32),
        "mask": ((128, 128), torch.int64),
        "size_group": ((128, 128), torch.uint8),
        "labels": ((m,), torch.int64),
        "masks": ((m, 128, 128), torch.bool),
        "boxes": ((m, 4), torch.float32),
        "keypoints": ((m, 5, 3), torch.float32),
        "sides": ((m,), torch.float32),
        "area": ((m,), torch.float32),
        "crowd": ((m,), torch.bool),
        "size": ((2,), torch.int64),
    }
    assert {name: (tuple(value.shape), value.dtype) for name, value in sample.items()} == forms
    assert len(val.classes) == len(val.palette) == 9
    assert val.classes == ("background", *val.object_classes)
    assert sample["size"].tolist() == [128, 128]
    assert not sample["crowd"].any()
    assert torch.equal(sample["area"], sample["masks"].sum((1, 2)).float())
    assert val.image_shape == (3, 128, 128)
    assert val.crop_size == (128, 128)
    assert val.found() == "val: 200 images, 9 classes"


def test_mean_and_std_describe_the_images(val):
    images = torch.stack([sample["image"] for sample in val])
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=0.1, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=0.1, rtol=0)


def test_a_sample_depends_on_seed_split_and_index_alone(val):
    fewer = Scenes("val", count=5)
    for index in (4, 0, 3):
        assert same(fewer[index], val[index])
    assert same(val[-1], val[199])
    assert not torch.equal(Scenes("val", seed=1)[0]["image"], val[0]["image"])
    assert not torch.equal(Scenes("train", hflip=0)[0]["image"], val[0]["image"])
    with pytest.raises(IndexError):
        fewer[5]


def test_a_set_that_is_too_large_to_keep_gives_the_same_scenes(val):
    large = Scenes("val", count=100_000)
    assert same(large[7], val[7])
    assert same(large[7], large[7])


def test_writing_into_a_sample_leaves_the_set_alone(val):
    sample, before = val[0], val[0]
    for name in TENSORS:
        sample[name].fill_(1)
    assert same(val[0], before)


def test_drawing_ignores_the_number_of_threads():
    data = Scenes("val", size=256, count=3)  # windows large enough for torch to split them
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = list(data)
        torch.set_num_threads(3)
        three = list(data)
    finally:
        torch.set_num_threads(threads)
    assert all(same(a, b) for a, b in zip(one, three, strict=True))


def test_the_scenes_are_those_of_the_first_release():
    # Pixels are computed only with correctly rounded operations, so this holds on every machine.
    digest = hashlib.sha256()
    for data in (Scenes("val", count=4), Scenes("train", count=2, size=75, seed=3, hflip=0, clutter=1, rotation=180)):
        for sample in data:
            digest.update(pixels(data, sample).numpy().tobytes())
            released = {**sample, "labels": sample["labels"] + 1}  # the first release counted the background
            for name in ("mask", "size_group", "labels", "masks", "boxes", "keypoints", "sides"):
                digest.update(released[name].numpy().astype("<f4").tobytes())
    assert digest.hexdigest() == "6bef70c73152ace21e7fe34831458fedb6f2e5c42030f35991c2a8938d44cbb5"


def inside(name: str, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether points lie in a shape, and whether they are so near its outline that rounding decides.

    Polygons by the even-odd rule, circles by radius: independent of the distances that the set draws with.
    """
    radius = np.hypot(u, v)

    def circle(x: float, y: float, r: float) -> tuple[np.ndarray, np.ndarray]:
        distance = np.hypot(u - x, v - y)
        return distance < r, np.abs(distance - r) < 1e-4

    def polygon(corners: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
        odd, near = np.zeros(u.shape, bool), np.zeros(u.shape, bool)
        for (x0, y0), (x1, y1) in itertools.pairwise([*corners, corners[0]]):
            length = math.hypot(x1 - x0, y1 - y0)
            along = ((u - x0) * (x1 - x0) + (v - y0) * (y1 - y0)) / length**2
            off = np.abs((u - x0) * (y1 - y0) - (v - y0) * (x1 - x0)) / length
            near |= (off < 1e-4) & (along > -1e-3) & (along < 1 + 1e-3)
            with np.errstate(divide="ignore", invalid="ignore"):
                crossing = x0 + (v - y0) * (x1 - x0) / (y1 - y0)
            odd ^= ((y0 > v) != (y1 > v)) & (u < crossing)
        return odd, near

    def regular(radii: list[float], turn: float = 0) -> tuple[np.ndarray, np.ndarray]:
        angles = [math.tau * k / len(radii) + turn for k in range(len(radii))]
        return polygon([(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)])

    if name == "disk":
        return circle(0, 0, 0.42)
    if name == "square":
        return regular([0.37 * math.sqrt(2)] * 4, math.pi / 4)
    if name == "triangle":
        return regular([0.55] * 3)
    if name == "star":
        return regular([0.55, 0.55 * math.cos(math.radians(72)) / math.cos(math.radians(36))] * 5)
    if name == "cross":
        a, b = 0.5, 0.17
        return polygon(
            [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
        )
    if name == "ring":
        return (radius > 0.25) & (radius < 0.49), (np.abs(radius - 0.25) < 1e-4) | (np.abs(radius - 0.49) < 1e-4)
    if name == "crescent":
        (full, edge), (bite, other) = circle(0, 0, 0.52), circle(0.27, 0, 0.4)
        return full & ~bite, edge | other
    (one, edge), (two, other) = circle(0.184, -0.144, 0.26), circle(-0.184, -0.144, 0.26)
    reach = 0.26 * math.sqrt(2)
    between, third = polygon([(0, 0.04 - reach), (reach, 0.04), (0, 0.04 + reach), (-reach, 0.04)])
    return one | two | between, edge | other | third


def frame(points: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the unit vectors of an object's axes right and down, from its key points."""
    down = points[3, :2] - points[1, :2]
    down /= np.hypot(*down)
    right = np.array([down[1], -down[0]])
    if name == "crescent":  # the only shape with a left and a right of its own: it opens to the nearer point
        arms = [np.hypot(*(points[k, :2] - points[0, :2])) for k in (2, 4)]
        right = right if arms[0] < arms[1] else -right
    return right, down


def whole(sample: dict, index: int, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an object's whole mask on the image widened by ``margin``, and its undecided pixels."""
    size = sample["image"].shape[-1]
    points, side = sample["keypoints"][index].double().numpy(), float(sample["sides"][index])
    name = Scenes.object_classes[sample["labels"][index]]
    right, down = frame(points, name)
    centers = np.arange(-margin, size + margin) + 0.5
    x, y = centers[None, :] - points[0, 0], centers[:, None] - points[0, 1]
    return inside(name, (x * right[0] + y * right[1]) / side, (x * down[0] + y * down[1]) / side)


@pytest.mark.parametrize("options", [{}, {"rotation": 180, "size": 90, "objects": (3, 25)}, {"hflip": 1}])
def test_masks_are_the_visible_parts_of_the_shapes(options):
    data = Scenes("train" if "hflip" in options else "val", count=25, **options)
    shapes, undecided_pixels = set(), 0
    for sample in data:
        size, margin = data.image_size, data.image_size
        middle = slice(margin, margin + size)
        expected = np.full((size, size), -1)
        undecided = np.zeros((size, size), bool)
        areas = []
        for index in range(len(sample["labels"])):
            full, near = whole(sample, index, margin)
            areas.append(full.sum())
            expected[full[middle, middle]] = index
            undecided |= near[middle, middle]
        actual = np.full((size, size), -1)
        for index, mask in enumerate(sample["masks"].numpy()):
            assert (actual[mask] == -1).all()  # masks do not overlap
            actual[mask] = index
            assert mask.sum() >= 0.25 * areas[index] - 2
        np.testing.assert_array_equal(actual[~undecided], expected[~undecided])
        undecided_pixels += undecided.sum()
        shapes |= set(sample["labels"].tolist())
    assert shapes == set(range(8))
    assert undecided_pixels < 3e-3 * len(data) * data.image_size**2


def test_class_and_size_maps_agree_with_the_objects(val):
    groups = set()
    for sample in val:
        mask, group = torch.zeros(128, 128, dtype=torch.int64), torch.full((128, 128), 255, dtype=torch.uint8)
        for label, side, own in zip(sample["labels"], sample["sides"], sample["masks"], strict=True):
            mask[own] = label + 1
            group[own] = 0 if side < 16 else 1 if side < 48 else 2
        assert torch.equal(sample["mask"], mask)
        assert torch.equal(sample["size_group"], group)
        groups |= set(group.unique().tolist())
    assert groups == {0, 1, 2, 255}
    assert val.size_groups == ("small", "medium", "large")


def test_boxes_are_tight(val):
    for sample in itertools.islice(val, 60):
        for (left, top, right, bottom), mask in zip(sample["boxes"].tolist(), sample["masks"].numpy(), strict=True):
            rows, columns = np.nonzero(mask)
            assert (left, top) == (columns.min(), rows.min())
            assert (right, bottom) == (columns.max() + 1, rows.max() + 1)


def test_visibility_of_key_points(val):
    counts = np.zeros(3, int)
    for sample in val:
        for index, points in enumerate(sample["keypoints"].tolist()):
            for x, y, visibility in points:
                if not (0 <= x < 128 and 0 <= y < 128):
                    expected = 0
                else:
                    over = sample["masks"][index + 1 :, math.floor(y), math.floor(x)]
                    expected = 1 if over.any() else 2
                assert visibility == expected
                counts[expected] += 1
    assert (counts > 50).all()


@pytest.mark.parametrize("name", OUTLINES)
def test_key_points_lie_on_the_outline_in_their_direction(name):
    u, v = torch.tensor(POINTS[name], dtype=torch.float64).unbind(1)
    assert OUTLINES[name](u, v)[1:].abs().max() < 1e-12
    center, top, right, bottom, left = POINTS[name]
    assert center == (0, 0)
    assert top[1] == min(v.tolist()) < 0 < bottom[1] == max(v.tolist())
    assert left[0] == min(u.tolist()) < right[0]


def test_left_is_left_of_right_whether_an_object_is_mirrored_or_not(val):
    left, right = KEYPOINTS.index("left"), KEYPOINTS.index("right")
    bulges = []
    for sample in val:
        points = sample["keypoints"][..., 0]
        assert (points[:, left] < points[:, right]).all()  # rotations are at most 30 degrees
        for label, (center, _, east, _, west) in zip(sample["labels"], points.tolist(), strict=True):
            if val.object_classes[label] == "crescent":
                bulges.append(center - west > east - center)
    assert 0.3 < np.mean(bulges) < 0.7


def test_sizes_are_log_uniform_over_a_factor_of_18():
    data = Scenes("val", count=300, objects=(1, 1), min_visible=0.01)
    octaves = np.sort(np.log2([float(sample["sides"]) for sample in data]))
    expected = np.linspace(math.log2(6), math.log2(108), len(octaves))
    assert np.abs(octaves - expected).max() < 0.25
    assert 2 ** (octaves[-1] - octaves[0]) > 16


def test_numbers_of_objects_and_classes(val):
    counts = np.bincount([len(sample["labels"]) for sample in Scenes("val", count=60, min_visible=1e-6)])
    assert np.flatnonzero(counts).max() == 12
    labels = torch.cat([sample["labels"] for sample in val])
    shares = torch.bincount(labels, minlength=8) / len(labels)
    assert (shares - 1 / 8).abs().max() < 0.04
    background = np.mean([float((sample["mask"] == 0).float().mean()) for sample in val])
    assert 0.4 < background < 0.7


def test_small_objects_are_mostly_in_front_of_large_ones(val):
    smaller_in_front = []
    for sample in val:
        boxes, sides = sample["boxes"], sample["sides"]
        for far, near in itertools.combinations(range(len(sides)), 2):
            low, high = torch.maximum(boxes[far, :2], boxes[near, :2]), torch.minimum(boxes[far, 2:], boxes[near, 2:])
            if (low < high).all() and sides[far] != sides[near]:
                smaller_in_front.append(bool(sides[near] < sides[far]))
    assert 0.65 < np.mean(smaller_in_front) < 0.95


def test_with_min_visible_1_no_object_is_cut_or_covered():
    for sample in Scenes("val", count=30, min_visible=1):
        for index in range(len(sample["labels"])):
            full, near = whole(sample, index, 40)
            assert abs(int(full.sum()) - int(sample["masks"][index].sum())) <= near.sum()
        assert (sample["keypoints"][:, 0, 2] > 0).all()


def test_a_scene_may_be_empty():
    data = Scenes("train", count=60, objects=(1, 1), min_visible=1, object_sizes=(128, 128), hflip=1)
    empty = next(sample for sample in data if not len(sample["labels"]))
    assert not empty["mask"].any()
    assert (empty["size_group"] == 255).all()
    trailing = {"masks": (128, 128), "boxes": (4,), "keypoints": (5, 3), "sides": (), "area": (), "crowd": ()}
    assert {name: tuple(empty[name].shape) for name in trailing} == {k: (0, *v) for k, v in trailing.items()}


def grown(mask: torch.Tensor, by: int) -> torch.Tensor:
    return torch.nn.functional.max_pool2d(mask[None].float(), 2 * by + 1, 1, by)[0] > 0


def test_the_image_shows_the_objects():
    data = Scenes("val", count=30, clutter=0)
    steps = []
    for sample in data:
        image = pixels(data, sample).float()
        for index, own in enumerate(sample["masks"]):
            nearer = sample["masks"][index + 1 :].any(0)
            inner = ~grown(~own, 1) & ~grown(nearer, 6)  # the tips of a star fade out over a few pixels
            inner[[0, -1]] = inner[:, [0, -1]] = False
            if inner.sum() < 9:
                continue
            color = image[:, inner]
            assert (color == color[:, :1]).all()  # without texture an object has one color
            around = grown(own, 2) & ~grown(own, 1) & ~grown(nearer, 6)
            if around.any():
                steps.append(float((image[:, around].mean(1) - color[:, 0]).abs().max()) / 255)
    assert len(steps) > 100
    assert np.mean(np.array(steps) > 0.1) > 0.9


def test_color_and_texture_say_nothing_of_the_class_or_the_size(val):
    values = {"brightness": [], "roughness": [], "label": [], "octave": []}
    for sample in val:
        for label, side, own in zip(sample["labels"], sample["sides"], sample["masks"], strict=True):
            inner = ~grown(~own, 1)
            if inner.sum() > 20:
                values["brightness"].append(float(sample["image"][:, inner].mean()))
                values["roughness"].append(float(sample["image"][:, inner].std(1).mean()))
                values["label"].append(int(label))
                values["octave"].append(math.log2(side))
    label = np.array(values["label"])
    for name in ("brightness", "roughness"):
        value = np.array(values[name])
        for one in range(8):
            error = value.std() / math.sqrt((label == one).sum())
            assert abs(value[label == one].mean() - value.mean()) < 4 * error
    assert abs(np.corrcoef(values["brightness"], values["octave"])[0, 1]) < 0.1


def test_clutter_sets_the_amplitude_of_textures():
    flat, busy = (Scenes("val", count=1, clutter=c)[0] for c in (0, 1))
    assert torch.equal(flat["mask"], busy["mask"])
    rough = [(s["image"][:, 1:] - s["image"][:, :-1]).abs().mean() for s in (flat, busy)]
    assert rough[1] > 2 * rough[0]


def test_camouflage_makes_the_background_as_colorful_as_the_objects():
    colorfulness = {}
    for camouflage in (0, 0.5, 1):
        inside, outside = [], []
        for sample in Scenes("val", count=40, camouflage=camouflage):
            image = sample["image"]
            color = (image - image.mean(0)).abs().amax(0)
            for index, own in enumerate(sample["masks"]):
                inner = ~grown(~own, 1) & ~grown(sample["masks"][index + 1 :].any(0), 6)
                if inner.any():
                    inside.append(float(color[inner].mean()))
            outside.append(float(color[~grown(sample["mask"] > 0, 6)].mean()))
        colorfulness[camouflage] = np.mean(outside) / np.mean(inside)
    assert colorfulness[0] < 1e-2
    assert 0.35 < colorfulness[0.5] < 0.6
    assert 0.8 < colorfulness[1] < 1.1


def flipped(sample: dict) -> dict:
    """Flip a sample by its definitions: pixels first, then boxes from masks, and points by name."""
    points = sample["keypoints"].clone()
    points[..., 0] = 128 - points[..., 0]
    points = points[:, [KEYPOINTS.index(name) for name in ("center", "top", "left", "bottom", "right")]]
    boxes = sample["boxes"].clone()
    boxes[:, 0], boxes[:, 2] = 128 - sample["boxes"][:, 2], 128 - sample["boxes"][:, 0]
    maps = {name: torch.flip(sample[name], [-1]) for name in ("image", "mask", "size_group", "masks")}
    return {**sample, **maps, "keypoints": points, "boxes": boxes}


def test_train_scenes_are_flipped_by_epoch_and_val_scenes_are_not():
    data, plain = Scenes("train", count=60), Scenes("train", count=60, hflip=0)
    fraction = []
    for epoch in range(2):
        data.set_epoch(epoch)
        turned = []
        for index in range(60):
            sample, base = data[index], plain[index]
            turned.append(not same(sample, base))
            assert same(sample, flipped(base) if turned[-1] else base)
        assert 0.3 < np.mean(turned) < 0.7
        fraction.append(turned)
    assert fraction[0] != fraction[1]
    always = Scenes("val", count=1, hflip=1)
    assert same(always[0], Scenes("val", count=1)[0])
    assert [KEYPOINTS[k] for k in KEYPOINTS_FLIPPED] == ["center", "top", "left", "bottom", "right"]


def test_a_second_visit_in_an_epoch_flips_anew():
    data = Scenes("train", count=40)
    first = [data[i]["image"] for i in range(40)]
    with data.visited(1):
        second = [data[i]["image"] for i in range(40)]
    assert 5 < sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True)) < 35


def test_photographs_are_backgrounds_and_the_splits_use_different_parts():
    from sklearn.datasets import load_sample_images

    photographs = [torch.from_numpy(image.copy()).movedim(2, 0) for image in load_sample_images().images]
    columns = {}
    for split in ("train", "val"):
        data = Scenes(split, count=6, objects=(1, 1), object_sizes=(4, 4), background="photos", size=64, hflip=0)
        textured = Scenes(split, count=6, objects=(1, 1), object_sizes=(4, 4), size=64, hflip=0)
        columns[split] = []
        for index in range(6):
            sample = data[index]
            assert torch.equal(sample["masks"], textured[index]["masks"])
            assert torch.equal(sample["keypoints"], textured[index]["keypoints"])
            columns[split].append(find(pixels(data, sample), sample["mask"] == 0, photographs))
    assert max(columns["train"]) + 64 <= 427 <= min(columns["val"])


def find(crop: torch.Tensor, background: torch.Tensor, photographs: list[torch.Tensor]) -> int:
    """Return the column of the photograph from which a crop was taken; it may be flipped."""
    background = ~grown(~background, 4)  # without soft edges
    for turned in (False, True):
        wanted, ground = (crop.flip(-1), background.flip(-1)) if turned else (crop, background)
        top, left = next(
            (r, c) for r, c in itertools.product((0, 30, 60), (0, 30, 60)) if ground[r : r + 4, c : c + 4].all()
        )
        for photograph in photographs:
            for r, c in places(photograph, wanted[:, top : top + 4, left : left + 4]):
                row, column = r - top, c - left
                there = photograph[:, max(row, 0) : row + 64, max(column, 0) : column + 64]
                if there.shape == wanted.shape and torch.equal(there[:, ground], wanted[:, ground]):
                    return column
    raise AssertionError("no photograph has this crop")


def test_photographs_continue_mirrored_where_they_end():
    image = Scenes("val", count=1, size=600, background="photos", objects=(1, 1), object_sizes=(4, 4), min_visible=1)[0]
    pixels = image["image"][0]
    rows = pixels[:, 300]
    middle = [m for m in range(100, 500) if torch.equal(rows[m - 90 : m], rows[m + 1 : m + 91].flip(0))]
    assert len(middle) >= 1
