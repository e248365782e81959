"""Segmentation models: agreement for each pixel and mean IoU, in differences and in the reports of the verbs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import widefield
from tolerances import FLOAT64
from widefield import dense
from widefield.surgery.compare import Tally, compare
from widefield.surgery.inputs import batches
from widefield.tasks.confusion import Confusion

CLASSES = 5


def logits_of(classes):
    """Return logits whose top class is the given one: (N, H, W) -> (N, CLASSES, H, W)."""
    return F.one_hot(classes, CLASSES).movedim(-1, 1).double()


def iou_by_counting(predicted, masks):
    """Return mean IoU from loops over classes, images and pixels."""
    pairs = [
        (p, m)
        for image, mask in zip(predicted, masks, strict=True)
        for p, m in zip(image.flatten().tolist(), mask.flatten().tolist(), strict=True)
        if m != 255 and m >= 0
    ]
    found = []
    for label in range(CLASSES):
        either = sum(label in pair for pair in pairs)
        if either:
            found.append(sum(pair == (label, label) for pair in pairs) / either)
    return sum(found) / len(found)


@given(seed=st.integers(0, 10**6), splits=st.lists(st.integers(1, 3), min_size=1, max_size=3), known=st.integers(1, 5))
def test_mean_iou_is_summed_over_all_images(seed, splits, known):
    generator = torch.Generator().manual_seed(seed)
    size = (sum(splits), 3, 4)
    before, after = (torch.randint(known, size, generator=generator) for _ in range(2))
    masks = torch.randint(known, size, generator=generator)
    masks[torch.rand(size, generator=generator) < 0.3] = 255
    masks[0, 0, 0], masks[0, 0, 1] = 0, -100  # one pixel is always labeled
    tally = Tally()
    parts = zip(before.split(splits), after.split(splits), masks.split(splits), strict=True)
    for one, other, mask in parts:
        tally.add(logits_of(one), {"out": logits_of(other)}["out"], mask)
    change = tally.difference()
    assert (change.images, change.pixels) == (len(before), before.numel())
    assert change.agreement == (before == after).double().mean().item()
    assert change.miou_before == pytest.approx(iou_by_counting(before, masks), rel=FLOAT64)
    assert change.miou_after == pytest.approx(iou_by_counting(after, masks), rel=FLOAT64)
    labeled = (masks != 255) & (masks >= 0)
    assert change.accuracy_before == pytest.approx((before == masks)[labeled].double().mean().item(), rel=FLOAT64)
    assert (change.score, change.scores) == ("mIoU", (change.miou_before, change.miou_after))


MASKS = torch.tensor([[[0, 1], [2, 255]], [[3, 255], [4, 0]]])


@pytest.mark.parametrize(
    "masks",
    [MASKS, MASKS[:, None], MASKS.to(torch.uint8), MASKS.numpy().astype(np.int32), list(MASKS), [MASKS[0], MASKS[1:2]]],
    ids=lambda masks: f"{type(masks).__name__} {getattr(masks, 'dtype', '')}",
)
def test_masks_may_be_tensors_arrays_or_lists(masks):
    right = logits_of(MASKS.where(MASKS != 255, 0))
    change = tallied(right, right.roll(1, dims=1), masks)
    assert (change.miou_before, change.miou_after) == (1.0, 0.0)
    assert "top-1 the same for 0.00% of pixels, mIoU 100.00% -> 0.00%" in str(change)


def tallied(*batch):
    tally = Tally()
    tally.add(*batch)
    return tally.difference()


@pytest.mark.parametrize("labels", [None, torch.zeros(2, dtype=torch.long), ["a", "b"], torch.rand(2, 2, 2), MASKS > 1])
def test_labels_that_are_not_masks_give_no_score(labels):
    change = tallied(logits_of(MASKS % 5), logits_of(MASKS % 5), labels)
    assert (change.agreement, change.accuracy_before, change.miou_before, change.scores) == (1.0, None, None, None)


def test_masks_without_a_labeled_pixel_give_no_score():
    assert tallied(logits_of(MASKS % 5), logits_of(MASKS % 5), torch.full_like(MASKS, 255)).scores is None


def test_masks_that_do_not_fit_are_refused():
    right = logits_of(MASKS % 5)
    with pytest.raises(ValueError, match=r"masks must hold classes below 5.*got 37"):
        tallied(right, right, MASKS.where(MASKS != 4, 37))
    with pytest.raises(ValueError, match="got 1 labels for 2 images"):
        tallied(right, right, MASKS[:1])


def test_logits_are_resized_to_masks_of_another_size():
    logits, sizes = torch.randn(2, CLASSES, 4, 6), [(9, 13), (4, 6)]
    masks = [torch.randint(CLASSES, size) for size in sizes]
    change = tallied(logits, logits, masks)
    resized = [F.interpolate(y[None], size=s, mode="bilinear") for y, s in zip(logits, sizes, strict=True)]
    expected = iou_by_counting([y.argmax(1)[0] for y in resized], masks)
    assert change.miou_before == pytest.approx(expected, rel=FLOAT64)
    assert change.pixels == 2 * 4 * 6


@pytest.mark.parametrize("corners", [False, True])
def test_mean_iou_is_that_of_an_evaluation(corners):
    torch.manual_seed(0)
    model = dense.SemanticFPN("test_resnet", CLASSES, channels=8, neck_channels=8, align_corners=corners).eval()
    images, masks = torch.randn(2, 3, 32, 48), torch.randint(CLASSES, (2, 50, 70))
    metric = {}
    for aligned in (corners, not corners):
        metric[aligned] = Confusion([str(k) for k in range(CLASSES)])
        found = F.interpolate(model(images), (50, 70), mode="bilinear", align_corners=aligned).argmax(1)
        metric[aligned].update(found, masks)
    expected = float(metric[corners].compute()["miou"])
    assert compare(model, model, [(images, masks)]).miou_before == pytest.approx(expected, rel=FLOAT64)
    assert expected != pytest.approx(float(metric[not corners].compute()["miou"]), rel=1e-3)


def test_one_channel_is_a_map_and_not_a_class():
    y = torch.randn(2, 1, 3, 3)
    assert tallied(y, y, torch.zeros(2, 3, 3, dtype=torch.long)).agreement is None


def test_loaders_give_masks():
    model = nn.Conv2d(3, CLASSES, 1)
    images, masks = torch.randn(2, 3, 4, 6), torch.randint(CLASSES, (2, 4, 6))
    expected = compare(model, model, [(images, masks)])
    assert expected.miou_before is not None
    assert compare(model, model, [{"image": images, "mask": masks}]) == expected
    assert compare(model, model, [{"image": images, "mask": masks, "label": torch.zeros(2)}]) == expected
    assert compare(model, model, [{"image": list(images), "mask": list(masks)}]) == expected


def test_images_of_several_sizes_are_yielded_one_by_one():
    model = nn.Conv2d(3, CLASSES, 1)
    images = [torch.randn(3, 4, 6), torch.randn(3, 5, 4)]
    masks = [torch.randint(CLASSES, (8, 12)), torch.randint(CLASSES, (5, 4))]
    found = list(batches([{"image": images, "mask": masks, "size_group": None}], model))
    assert [tuple(x.shape) for x, _ in found] == [(1, 3, 4, 6), (1, 3, 5, 4)]
    assert [labels[0] is mask for (_, labels), mask in zip(found, masks, strict=True)] == [True, True]
    with pytest.raises(TypeError, match="images must be floating-point"):
        list(batches([{"image": ["a.png"]}], model))


class Segmenter(nn.Module):
    """A convolution that routes, a plain one, and the logits of every pixel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        y = self.head(self.mix(self.norm(self.stem(x)).relu()))
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)


@pytest.fixture
def loader():
    torch.manual_seed(0)
    return [{"image": torch.randn(2, 3, 24, 17), "mask": torch.randint(CLASSES, (2, 24, 17))} for _ in range(2)]


def test_the_verbs_report_pixels_and_mean_iou(loader):
    model = widefield.convert(Segmenter(), widefield.MoRF((3, 7)), "mix").eval()
    with torch.no_grad():
        model.mix.router.gate.weight.normal_()
    reports = []
    static = widefield.specialize(model, loader, report=reports.append)
    fused = widefield.reparameterize(static, loader[0]["image"], report=reports.append)
    small = widefield.trim(fused, 0.05, loader=loader, report=reports.append)
    specialized, fusing, trimmed = reports
    assert specialized.measured == compare(model, static, loader)
    assert specialized.measured.miou_before == compare(model, model, loader).miou_before
    assert specialized.rows()[0]["mIoU"] == f"{specialized.layers[0].change.miou_after:.2%}"
    assert "accuracy" not in specialized.rows()[0]
    assert fusing.difference.agreement == 1.0
    assert "top-1 the same for 100.00% of pixels" in fusing.summary()
    assert trimmed.change == compare(fused, small, loader)
    assert trimmed.totals()["mIoU"] == f"{trimmed.change.miou_before:.1%} -> {trimmed.change.miou_after:.1%}"
