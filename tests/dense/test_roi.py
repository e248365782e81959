"""Regions of interest: levels, features, samples, masks inside boxes and on the image."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dense.networks import objects
from tolerances import BFLOAT16, FLOAT64, close
from widefield import dense
from widefield.dense.box_head import BoxHead
from widefield.dense.boxes import Assigner, Sampler, clip
from widefield.dense.mask_head import FCNMaskHead, mask_targets, paste_masks
from widefield.dense.roi import RoISample, batched, roi_features, roi_levels, sampled_rois

STRIDES = (4, 8, 16, 32)


def _maps(count=2, channels=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, channels, 96 // s, 128 // s, generator=generator).to(dtype) for s in STRIDES]


def _bilinear(x, row, column):
    """Return the value of a map (H, W) at a point; beyond one cell outside it is 0, within it that of the border."""
    height, width = x.shape
    if not (-1 <= row <= height and -1 <= column <= width):
        return 0.0
    row, column = (min(max(v, 0.0), n - 1.0) for v, n in ((row, height), (column, width)))
    top, left = math.floor(row), math.floor(column)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    a, b = row - top, column - left
    upper = (1 - b) * x[top, left] + b * x[top, right]
    return float((1 - a) * upper + a * ((1 - b) * x[bottom, left] + b * x[bottom, right]))


def _aligned(x, box, stride, size):
    """RoIAlign of one map (H, W) by its definition: the mean of samples in each bin."""
    x1, y1, x2, y2 = (v / stride - 0.5 for v in box)
    height, width = (y2 - y1) / size, (x2 - x1) / size
    rows, columns = math.ceil(height), math.ceil(width)
    found = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            values = [
                _bilinear(x, y1 + (i + (a + 0.5) / rows) * height, x1 + (j + (b + 0.5) / columns) * width)
                for a in range(rows)
                for b in range(columns)
            ]
            found[i, j] = sum(values) / max(len(values), 1)
    return torch.from_numpy(found)


@given(
    x1=st.floats(-20, 120), y1=st.floats(-20, 90), width=st.floats(1, 200), height=st.floats(1, 200),
    image=st.integers(0, 1),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_features_are_means_of_samples(x1, y1, width, height, image):
    maps = _maps(channels=1)
    roi = torch.tensor([[image, x1, y1, x1 + width, y1 + height]], dtype=torch.float64)
    level = min(max(math.floor(math.log2(math.sqrt(width * height) / 56 + 1e-6)), 0), 3)
    assert roi_levels(roi, STRIDES).tolist() == [level]
    found = roi_features(maps, roi, STRIDES, 4)[0, 0]
    close(found, _aligned(maps[level][image, 0], roi[0, 1:].tolist(), STRIDES[level], 4), FLOAT64)


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_features_are_the_same_on_several_threads(count, mode):
    maps = [torch.randn(2, 5, 32 >> level, 40 >> level, requires_grad=mode is torch.enable_grad) for level in range(4)]
    corner = 60 * torch.rand(count, 2)
    rois = torch.cat((torch.arange(count)[:, None] % 2.0, corner, corner + 5 + 80 * torch.rand(count, 2)), 1)
    weights = torch.randn(count, 5, 7, 7).transpose(2, 3)
    before = torch.get_num_threads()
    found, gradients = [], []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with mode():
                found.append(roi_features(maps, rois, (4, 8, 16, 32), 7))
            if mode is torch.enable_grad:
                gradients.append(torch.autograd.grad(found[-1], maps, weights))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert found[1].is_inference() == (mode is torch.inference_mode)
    for one, several in zip(*gradients, strict=True) if gradients else ():
        assert one.isfinite().all()
        assert torch.equal(one, several)


def test_features_keep_the_order_of_the_rois():
    maps = _maps()
    boxes = torch.tensor([[0, 0, 90, 90], [3, 5, 12, 30], [0, 0, 128, 96], [40, 20, 100, 88]], dtype=torch.float64)
    rois = batched([boxes, boxes.flip(0)])
    assert rois[:, 0].tolist() == [0.0] * 4 + [1.0] * 4
    together = roi_features([*maps, torch.zeros(2, 3, 1, 2)], rois, STRIDES, 7)
    alone = torch.cat([roi_features(maps, roi[None], STRIDES, 7) for roi in rois])
    assert torch.equal(together, alone)


def test_every_level_has_a_gradient():
    for boxes in ([[3.0, 5.0, 12.0, 30.0]], []):
        maps = [x.requires_grad_() for x in _maps()]
        rois = batched([torch.zeros(0, 4), torch.tensor(boxes).reshape(-1, 4)])
        features = roi_features(maps, rois, STRIDES, 7)
        assert features.shape == (len(boxes), 3, 7, 7)
        features.square().sum().backward()
        assert [bool(x.grad.any()) for x in maps] == [bool(boxes), False, False, False]


def test_half_precision_keeps_its_dtype():
    maps = _maps()
    rois = torch.tensor([[0, 10.3, 20.7, 60.2, 70.9]])
    found = roi_features([x.bfloat16() for x in maps], rois, STRIDES, 7)
    assert found.dtype == torch.bfloat16
    close(found, roi_features(maps, rois, STRIDES, 7), BFLOAT16)


def test_samples_put_objects_first_and_add_their_boxes():
    crowd = torch.tensor([False, False, True])
    target = objects((0, 0, 20, 20), (30, 30, 60, 60), (0, 40, 20, 60), labels=[2, 1, 0], crowd=crowd)
    proposals = torch.tensor([[50.0, 0, 60, 10], [30, 30, 60, 59], [0, 42, 20, 60], [0, 1, 20, 20]])
    sample = sampled_rois(proposals, target, Assigner(0.5, 0.5, 0.5, low_quality=False), Sampler(100, 0.25), 3)
    expected = [*target.boxes[:2].tolist(), *proposals[[1, 3, 0, 2]].tolist()]
    assert sample.boxes.tolist() == expected
    assert sample.labels.tolist() == [2, 1, 1, 2, 3, 3]
    assert sample.objects.tolist() == [0, 1, 1, 0]
    assert sample.truth.tolist() == target.boxes[[0, 1, 1, 0]].tolist()
    assert sample.given.tolist() == [True, True, False, False, False, False]
    assert torch.equal(sample.positive, sample.boxes[:4])


def test_samples_are_limited_and_seeded():
    torch.manual_seed(0)
    corner = torch.rand(300, 2) * 60
    proposals = torch.cat((corner, corner + 4), 1)
    target = objects(*[[x, y, x + 4, y + 4] for x, y in corner[:50].tolist()], labels=[0] * 50)
    assigner, sampler = Assigner(0.5, 0.5, 0.5, low_quality=False), Sampler(40, 0.25)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sample = sampled_rois(proposals, target, assigner, sampler, 3)
        assert len(sample.boxes) == 40
        assert len(sample.objects) == 10
        drawn.append(sample.boxes)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("box_loss", ["l1", "smooth_l1", "giou"])
@pytest.mark.parametrize("class_agnostic", [True, False])
def test_losses_of_perfect_boxes_are_zero(box_loss, class_agnostic):
    torch.manual_seed(0)
    head = BoxHead(4, 3, box_loss=box_loss, class_agnostic=class_agnostic, channels=16).double()
    target = objects((0, 0, 20, 20), (30, 30, 60, 60), labels=[2, 1])
    proposals = torch.tensor([[1.0, 2, 21, 19], [50, 0, 60, 10]])
    sample = sampled_rois(proposals, target, Assigner(0.5, 0.5, 0.5), Sampler(100), 3)
    perfect = head.coder.encode(sample.positive.double(), sample.truth.double())
    deltas = torch.randn(len(sample.boxes), 4 if class_agnostic else 12, dtype=torch.float64)
    rows = torch.arange(len(perfect))
    if class_agnostic:
        deltas[: len(perfect)] = perfect
    else:
        deltas.view(-1, 3, 4)[rows, sample.labels[: len(perfect)]] = perfect
    logits = torch.nn.functional.one_hot(sample.labels, 4).double() * 100
    losses = head.losses(logits, deltas, [sample])
    assert losses["loss_cls"] < 1e-12
    assert losses["loss_bbox"].abs() < 1e-7
    moved = head.refined(sample.boxes.double(), logits, deltas, (64, 64), sample.labels)[: len(perfect)]
    close(moved, sample.truth, FLOAT64)
    deltas += 0.5
    assert head.losses(logits, deltas, [sample])["loss_bbox"] > 1e-3


def test_losses_of_boxes_are_those_of_their_formulas():
    target = objects((0, 0, 20, 20), labels=[1])
    sample = sampled_rois(torch.zeros(0, 4), target, Assigner(0.5, 0.5, 0.5), Sampler(100), 3)
    deltas = torch.tensor([[0.0, 0.0, 2.0, 0.0]], dtype=torch.float64)  # 0.2 times 2: as wide as exp(0.4) times 20
    logits, width = torch.zeros(1, 4, dtype=torch.float64), math.exp(0.4)
    expected = {"l1": 2.0, "smooth_l1": 1.5, "iou": 10 * math.log(width), "giou": 10 * (1 - 1 / width)}
    for name, value in expected.items():
        head = BoxHead(4, 3, box_loss=name, class_agnostic=True, channels=16)
        assert head.losses(logits, deltas, [sample])["loss_bbox"].item() == pytest.approx(value, rel=1e-6)
    head = BoxHead(4, 3, box_loss="smooth_l1", beta=4.0, box_weight=3.0, class_agnostic=True, channels=16)
    assert head.losses(logits, deltas, [sample])["loss_bbox"].item() == pytest.approx(3 * 0.5 * 4 / 4, rel=1e-6)


def test_refined_boxes_of_the_background_follow_the_best_class():
    head = BoxHead(4, 2, channels=8)
    boxes = torch.tensor([[10.0, 10, 30, 30]] * 3)
    deltas = torch.zeros(3, 8)
    deltas[:, 0], deltas[:, 4] = 1.0, 5.0  # class 0 moves by 2 pixels, class 1 by 10
    logits = torch.tensor([[0.0, 1.0, 9.0], [1.0, 0.0, 9.0], [1.0, 0.0, 9.0]])
    found = head.refined(boxes, logits, deltas, (64, 64), torch.tensor([2, 2, 1]))
    assert found[:, 0].round().tolist() == [20.0, 12.0, 20.0]
    assert head.refined(boxes, logits, deltas, (64, 64))[:, 0].round().tolist() == [20.0, 12.0, 12.0]


def test_the_mask_loss_reads_the_label_alone():
    torch.manual_seed(0)
    head = FCNMaskHead(4, 3, channels=4, num_convs=1).double()
    target = objects((8.0, 8, 40, 40), labels=[1])
    sample = sampled_rois(torch.tensor([[8.0, 8, 40, 40]]), target, Assigner(0.5, 0.5, 0.5), Sampler(100), 3)
    assert mask_targets(sample, target, 28).all()
    logits = torch.full((2, 3, 28, 28), -50.0, dtype=torch.float64)
    logits[:, 1] = 50.0
    assert head.loss(logits, [sample], [target]) < 1e-12
    assert head.loss(-logits, [sample], [target]) > 10


def test_half_of_a_cell_sets_it():
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, :, :33] = True
    target = dense.Targets(torch.tensor([[0.0, 0, 64, 64]]), torch.tensor([0]), masks, torch.tensor([False]), (64, 64))
    sample = sampled_rois(torch.zeros(0, 4), target, Assigner(0.5, 0.5, 0.5), Sampler(100), 1)
    found = mask_targets(sample, target, 16)[0]  # cells of four pixels: the ninth has one of them
    assert found.sum(1).tolist() == [8] * 16
    masks[0, :, :34] = True
    assert mask_targets(sample, target, 16)[0].sum(1).tolist() == [9] * 16


@given(
    st.lists(st.tuples(st.floats(-9, 30), st.floats(-9, 24), st.floats(0.2, 45), st.floats(0.2, 40), st.integers(0, 2)),
             max_size=5),
    st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_targets_of_masks_are_means_of_samples_of_whole_masks(rois, seed):
    """The first and the fourth object are crowd regions; boxes may leave the image, or lie outside of it."""
    height, width = 23, 31
    masks = torch.rand(5, height, width, generator=torch.Generator().manual_seed(seed)) < 0.6
    masks[2] = False
    masks[2, 7, 30] = True  # one pixel
    crowd = torch.tensor([True, False, False, True, False])
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h, _ in rois], dtype=torch.float64).reshape(-1, 4)
    owners = torch.tensor([roi[4] for roi in rois], dtype=torch.long)
    sample = RoISample(boxes, owners, owners, boxes, torch.zeros(len(boxes), dtype=torch.bool))
    target = dense.Targets(torch.zeros(5, 4), torch.zeros(5).long(), masks, crowd, (height, width))
    found = mask_targets(sample, target, 4)
    assert found.shape == (len(boxes), 4, 4)
    for box, owner, inside in zip(clip(boxes, (height, width)), owners, found, strict=True):
        covered = _aligned(masks[~crowd][owner].double(), box.tolist(), 1, 4)
        tie = (covered - 0.5).abs() < FLOAT64
        assert torch.equal(inside | tie, (covered >= 0.5) | tie)


def _pasted(mask, box, size, threshold):
    """Bilinear interpolation at the centers of pixels by its definition; outside of the grid, values are 0."""
    x1, y1, x2, y2 = box
    padded = np.pad(mask.numpy(), 1)
    side = mask.shape[0]
    found = np.zeros(size, dtype=bool)
    for row in range(size[0]):
        for column in range(size[1]):
            v, u = (row + 0.5 - y1) / (y2 - y1) * side + 0.5, (column + 0.5 - x1) / (x2 - x1) * side + 0.5
            if 0 <= v < side + 1 and 0 <= u < side + 1:
                i, j = int(v), int(u)
                a, b = v - i, u - j
                upper = (1 - b) * padded[i, j] + b * padded[i, j + 1]
                found[row, column] = (1 - a) * upper + a * (
                    (1 - b) * padded[i + 1, j] + b * padded[i + 1, j + 1]
                ) >= threshold
    return torch.from_numpy(found)


@given(
    x1=st.floats(-15, 20), y1=st.floats(-15, 20), width=st.floats(0.5, 50), height=st.floats(0.5, 50),
    threshold=st.sampled_from([0.05, 0.3, 0.5, 0.9]), side=st.sampled_from([1, 2, 7]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_pasted_masks_are_interpolated_at_pixel_centers(x1, y1, width, height, threshold, side, seed):
    mask = torch.rand(side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    box = torch.tensor([[x1, y1, x1 + width, y1 + height]], dtype=torch.float64)
    found = paste_masks(mask[None], box, (23, 31), threshold)
    assert found.dtype == torch.bool
    assert torch.equal(found[0], _pasted(mask, box[0].tolist(), (23, 31), threshold))


def test_pasted_masks_of_awkward_boxes():
    boxes = torch.tensor(
        [[4.0, 4, 12, 12], [30, 30, 50, 50], [-9, -9, -2, -2], [5, 5, 5, 9], [7, 7, 3, 9], [0, 0, 20, 16]]
    )
    found = paste_masks(torch.ones(6, 28, 28), boxes, (16, 20))
    assert found.shape == (6, 16, 20)
    assert found.sum((1, 2)).tolist() == [64, 0, 0, 0, 0, 320]
    assert found[0, 4:12, 4:12].all()
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (16, 20)).shape == (0, 16, 20)


def test_wrong_masks_are_refused():
    with pytest.raises(
        ValueError, match=r"masks must be \(D, S, S\) and boxes \(D, 4\); got \(2, 28, 28\) and \(3, 4\)"
    ):
        paste_masks(torch.zeros(2, 28, 28), torch.zeros(3, 4), (8, 8))
    with pytest.raises(ValueError, match="threshold must be above 0 and at most 1; got 0"):
        paste_masks(torch.zeros(1, 28, 28), torch.zeros(1, 4), (8, 8), threshold=0)


def test_wrong_heads_are_refused():
    with pytest.raises(ValueError, match="box_head must be one of 'shared2fc', '4conv1fc'; got 'shared2fcs'"):
        BoxHead(8, 3, kind="shared2fcs")
    with pytest.raises(ValueError, match=r"box_loss must be one of .* got 'diou'"):
        BoxHead(8, 3, box_loss="diou")


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_masks_of_the_labels_alone_are_those_of_all(class_agnostic):
    torch.manual_seed(0)
    head = FCNMaskHead(6, 3, channels=5, num_convs=2, class_agnostic=class_agnostic).double()
    nn.init.normal_(head.conv_logits.bias)
    features, labels = torch.randn(4, 6, 14, 14, dtype=torch.float64), torch.tensor([2, 0, 1, 1])
    expected = head.of_labels(head(features), labels).sigmoid()
    close(head.probabilities(features, labels), expected, FLOAT64)
    assert head.probabilities(features[:0], labels[:0]).shape == (0, 28, 28)
