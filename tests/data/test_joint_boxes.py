"""Transforms of images with their objects, by the rules of published detectors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_objects import write_coco
from torchvision.transforms import v2

from tolerances import FLOAT32, close
from widefield import data
from widefield.data import joint, joint_boxes
from widefield.data.base import seeded
from widefield.data.transforms import SHORT_SIDES, DetectionAugmentation


def sample_of(height, width, boxes, *, crowd=None, masks=True):
    """Return a sample whose first two channels hold the column and the row of each pixel; masks fill their boxes."""
    columns, rows = torch.arange(width, dtype=torch.uint8), torch.arange(height, dtype=torch.uint8)
    image = torch.stack([columns.expand(height, -1), rows[:, None].expand(-1, width), torch.zeros(height, width)])
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    sample = {
        "image": image.to(torch.uint8),
        "boxes": boxes,
        "labels": torch.arange(len(boxes)),
        "crowd": torch.tensor(crowd if crowd is not None else [False] * len(boxes), dtype=torch.bool),
        "area": torch.zeros(len(boxes)),
    }
    if masks:
        sample["masks"] = torch.zeros(len(boxes), height, width, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(sample["masks"], boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = True
    return sample


def train(sample, other=lambda: None, seed=0, **options):
    """Return a transformed sample; images are not normalized, and have values up to 255."""
    transform = joint_boxes.Training(DetectionAugmentation(**options), (0.0,) * 3, (1 / 255,) * 3)
    with seeded((seed,)):
        return transform(sample, other)


BOXES = [[3, 4, 20, 30], [40, 10, 75, 44], [0, 0, 90, 60], [60, 50, 90, 60]]


def test_resizing_scales_boxes_and_masks_by_the_rounded_sizes():
    found = train(sample_of(60, 90, BOXES), scale=(133, 80), hflip=0)
    assert found["image"].shape == (3, 80, 120)
    assert found["masks"].shape == (4, 80, 120)
    close(found["boxes"], torch.tensor(BOXES) * (80 / 60), FLOAT32)
    close(found["area"], found["masks"].sum((1, 2)).float(), FLOAT32)
    odd = train(sample_of(61, 90, BOXES, masks=False), scale=(133, 80), hflip=0)
    assert odd["image"].shape == (3, 80, int(90 * 80 / 61 + 0.5))
    ratios = torch.tensor([118 / 90, 80 / 61, 118 / 90, 80 / 61])
    close(odd["boxes"], torch.tensor(BOXES) * ratios, FLOAT32)
    close(odd["area"], (odd["boxes"][:, 2:] - odd["boxes"][:, :2]).prod(1), FLOAT32)


def test_a_flip_turns_image_boxes_and_masks():
    plain, flipped = (train(sample_of(60, 90, BOXES), scale=None, hflip=p) for p in (0, 1))
    assert torch.equal(flipped["image"], plain["image"].flip(-1))
    assert torch.equal(flipped["masks"], plain["masks"].flip(-1))
    close(flipped["boxes"][0], torch.tensor([70.0, 4.0, 87.0, 30.0]), FLOAT32)


@pytest.mark.parametrize("options", [{"short_sides": [48, 64, 80]}, {"short_range": [50, 70]}])
def test_shorter_sides_are_drawn_from_a_list_or_a_range(options):
    sides = [
        min(train(sample_of(30, 60, []), seed=s, scale=(1000, 80), **options)["image"].shape[1:]) for s in range(80)
    ]
    if "short_sides" in options:
        assert set(sides) == {48, 64, 80}
    else:
        assert set(sides) <= set(range(50, 71))
        assert len(set(sides)) > 12
        assert {50, 70} & set(sides)


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(20, 100), st.integers(20, 100)),
    span=st.tuples(st.integers(1, 60), st.integers(0, 60)),
    seed=st.integers(0, 10_000),
)
def test_a_crop_removes_the_objects_outside_and_clips_the_others(size, span, seed):
    height, width = size
    rng = np.random.default_rng(seed)
    lows = rng.integers(0, [width - 1, height - 1], (6, 2))
    highs = np.minimum(lows + rng.integers(1, 40, (6, 2)), [width, height])
    before = sample_of(height, width, np.concatenate([lows, highs], 1).tolist())
    crop = joint_boxes.RangeCrop((span[0], sum(span)))
    with seeded((seed,)):
        after = joint.apply(v2.Compose([crop]), before)
    left, top = after["image"][:2, 0, 0].tolist()
    rows, columns = after["image"].shape[1:]
    for side, whole in ((rows, height), (columns, width)):
        assert min(whole, span[0]) <= side <= min(whole, sum(span))
    expected = {}
    for label, (x0, y0, x1, y1) in zip(before["labels"].tolist(), before["boxes"].tolist(), strict=True):
        box = [max(x0 - left, 0), max(y0 - top, 0), min(x1 - left, columns), min(y1 - top, rows)]
        if box[0] < box[2] and box[1] < box[3]:
            expected[label] = box
    assert after["labels"].tolist() == list(expected)
    assert after["boxes"].tolist() == list(expected.values())
    part = before["masks"][list(expected), top : top + rows, left : left + columns]
    assert torch.equal(after["masks"], part)


def test_the_pipeline_of_3x_schedules_crops_half_of_the_images():
    cropped, sides = 0, set()
    whole = sample_of(240, 250, [[0, 0, 250, 240]], masks=False)
    for seed in range(60):
        found = train(whole, seed=seed, pipeline="multi_scale_crop", hflip=0)
        cropped += found["image"][0, 0, 0] > 0.9 or found["image"][0, -1, -1] < 248
        sides.add(min(found["image"].shape[1:]))
        close(found["boxes"], torch.tensor([[0.0, 0.0, *found["image"].shape[:0:-1]]]), FLOAT32)
    assert 20 <= cropped <= 40
    assert sides <= set(SHORT_SIDES)
    assert len(sides) > 8


def test_large_scale_jitter_takes_boxes_from_masks_and_drops_empty_ones():
    sizes = []
    for seed in range(60):
        before = sample_of(60, 90, [[10, 10, 12, 12], [40, 20, 80, 50]], crowd=[False, True])
        before["masks"][1, 20:30] = False  # the box of the mask is smaller than that of the file
        found = train(before, seed=seed, pipeline="large_scale_jitter", size=64, hflip=0)
        assert max(found["image"].shape[1:]) <= 64
        sizes.append(max(found["image"].shape[1:]))
        for box, mask in zip(found["boxes"].tolist(), found["masks"], strict=True):
            rows, columns = mask.nonzero().unbind(1)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert min(sizes) < 20
    assert sizes.count(64) > 20
    plain = train(sample_of(60, 90, BOXES, masks=False), pipeline="large_scale_jitter", size=64, ratio=(1, 1), hflip=0)
    assert plain["image"].shape == (3, 43, 64)
    close(plain["boxes"], torch.tensor(BOXES) * torch.tensor([64 / 90, 43 / 60] * 2), FLOAT32)


def test_tiny_objects_are_left_out_if_asked_and_crowds_are_kept():
    boxes = [[0, 0, 4, 30], [10, 10, 15, 15], [20, 20, 22, 22]]
    found = train(sample_of(60, 90, boxes, crowd=[False, False, True]), scale=None, hflip=0, min_size=4)
    assert found["labels"].tolist() == [1, 2]
    assert found["masks"].shape == (2, 60, 90)
    assert train(sample_of(60, 90, boxes), scale=None)["labels"].tolist() == [0, 1, 2]


def test_regions_beyond_the_border_are_left_out():
    """Boxes may pass the border by a pixel; a crowd region there has no pixel to ignore."""
    beyond = [[10, 60, 30, 61], [90, 10, 91, 30], [10, 59, 30, 61]]
    found = train(sample_of(60, 90, beyond, crowd=[True, True, True]), scale=None, hflip=0)
    assert found["boxes"].tolist() == [[10, 59, 30, 60]]


def test_pasted_objects_cover_those_below():
    below = [[0, 0, 20, 20], [30, 30, 34, 34], [40, 0, 60, 60], [0, 40, 20, 60]]
    above = [[10, 0, 20, 20], [30, 30, 34, 34], [40, 0, 55, 60], [0, 0, 64, 64]]
    options = {"pipeline": "large_scale_jitter", "size": 64, "ratio": (1, 1), "copy_paste": 1.0, "hflip": 0}
    source = sample_of(64, 64, above, crowd=[False, False, False, True])
    source["image"] += 100
    counts = set()
    for seed in range(40):
        found = train(sample_of(64, 64, below), lambda: source, seed=seed, **options)
        shown = (found["image"] - sample_of(64, 64, below)["image"]).round()
        pasted = shown[0] == 100
        assert set(shown.unique().tolist()) <= {0, 100}
        # What was pasted is a union of objects that are not crowds, and these come last, whole.
        added = [mask for mask in found["masks"] if bool(mask.any()) and bool((pasted | ~mask).all())]
        assert torch.equal(torch.stack(added).any(0) if added else torch.zeros_like(pasted), pasted)
        counts.add(len(added))
        rest = found["masks"][: len(found["masks"]) - len(added)]
        assert not (rest & pasted).any()
        # The first object keeps a box within 10 pixels; the third is cut by 15 pixels and has exactly 300 left.
        labels = found["labels"][: len(rest)].tolist()
        assert {0, 3} <= set(labels)
        assert (1 in labels) == (not pasted[31, 31])
        assert (2 in labels) == (not pasted[30, 45])
        assert torch.equal(found["boxes"], joint_boxes.mask_boxes(found["masks"]))
    assert counts == {0, 1, 2, 3}


def test_images_are_padded_for_pasting_and_without_a_source_nothing_is_pasted():
    options = {"pipeline": "large_scale_jitter", "size": 64, "ratio": (0.5, 0.5), "copy_paste": 1.0, "hflip": 0}
    found = train(sample_of(60, 60, [[0, 0, 60, 60]]), **options)
    assert found["image"].shape == (3, 64, 64)
    assert found["boxes"].tolist() == [[0, 0, 32, 32]]
    assert not found["image"][:, 32:].any()


@pytest.mark.parametrize("pipeline", ["resize", "multi_scale_crop", "large_scale_jitter"])
def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path, pipeline):
    write_coco(tmp_path)
    options = {"root": tmp_path, "masks": True, "pipeline": pipeline, "size": 80}
    if pipeline == "large_scale_jitter":
        options["copy_paste"] = 0.7
    else:
        options |= {"scale": (120, 80), "short_sides": [40, 60, 80]}
    one, other = (data.create("coco", "train", **options) for _ in range(2))
    torch.manual_seed(7)
    first = [one[i] for i in (0, 1, 2, 3)]
    second = [other[i] for i in (3, 2, 1, 0)][::-1]
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    one.set_epoch(1)
    assert any(a["image"].shape != b["image"].shape or not torch.equal(a["image"], b["image"])
               for a, b in zip(first, one, strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"pipeline": "lsj"}, ValueError, "pipeline must be one of 'resize', 'multi_scale_crop', 'large_scale_jitter'"),
        ({"short_sides": []}, TypeError, "short_sides must be a sequence of sides"),
        ({"short_sides": [480, 0]}, ValueError, "every entry of short_sides must be at least 1; got 0"),
        ({"short_range": [640, 700, 800]}, TypeError, "short_range must be 2 sides in pixels"),
        ({"short_range": [800, 640]}, ValueError, r"short_range must be \(smallest, largest\); got \(800, 640\)"),
        ({"short_range": [640, 800], "short_sides": [640]}, ValueError, "replace each other"),
        ({"copy_paste": 0.5}, ValueError, "copy_paste needs pipeline: large_scale_jitter; the pipeline is resize"),
        ({"pipeline": "large_scale_jitter", "short_sides": [640]}, ValueError, "short_sides has no effect"),
        ({"pipeline": "multi_scale_crop", "scale": None}, ValueError, "scale must be a rectangle"),
        ({"min_size": -1}, ValueError, "min_size must be from 0.0"),
        ({"photometric": 1}, TypeError, "photometric must be True or False; got 1"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options, error, text):
    with pytest.raises(error, match=text):
        DetectionAugmentation(**options)


def test_pasting_needs_masks(tmp_path):
    write_coco(tmp_path)
    with pytest.raises(ValueError, match="copy_paste needs masks: set masks: true"):
        data.create("coco", "train", root=tmp_path, pipeline="large_scale_jitter", copy_paste=0.5)
