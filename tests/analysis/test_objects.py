"""Effective receptive fields of objects, averaged by size and measured in units of their boxes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from analysis.known_fields import Counter, sample
from tolerances import FLOAT64, close
from widefield import dense
from widefield.analysis import object_receptive_fields
from widefield.analysis._objects import CELLS


def test_the_field_of_a_sum_over_a_box_is_the_box():
    images = [sample([[4, 8, 12, 16], [20, 10, 40, 50]]), sample([[60, 30, 68, 38]])]
    result = object_receptive_fields(Counter(), images, sizes=(16,), extent=1.5)
    small, large = result.groups
    assert [group.name for group in result.groups] == ["below 16 px", "16 px and more"]
    assert (small.objects, large.objects) == (2, 1)
    assert small.side == 8
    assert large.side == pytest.approx(np.sqrt(20 * 40))
    for group in result.groups:
        assert group.inside == pytest.approx(1, abs=1e-12)
        inner = slice(CELLS // 3, 2 * CELLS // 3)  # one of three boxes
        uniform = np.full((CELLS // 3, CELLS // 3), (3 / CELLS) ** 2)
        close(torch.from_numpy(group.field[inner, inner].copy()), torch.from_numpy(uniform), FLOAT64)
        assert group.field.sum() == pytest.approx(1, abs=1e-12)
    # Pixel centers within sqrt(share) of the box; pixels of 1/8, 1/20 and 1/40 of the box.
    assert small.reach[0.5] == pytest.approx(np.sqrt(0.5), abs=1 / 8)
    assert large.reach[0.9] == pytest.approx(np.sqrt(0.9), abs=1 / 20)
    assert large.reach_pixels[0.9] == pytest.approx(large.reach[0.9] * large.side)


def test_a_blur_reaches_further_in_units_of_small_boxes():
    images = [sample([[40, 28, 48, 36], [24, 8, 72, 56]])]
    result = object_receptive_fields(Counter(blur=9), images, sizes=(16,))
    small, large = result.groups
    # One axis: the box of n pixels convolved with a window of 9; the share inside is 1 - (2/9) (1+2+3+4) / n.
    for group, side in ((small, 8), (large, 48)):
        assert group.inside == pytest.approx((1 - 2 / 9 * 10 / side) ** 2, rel=1e-9)
    assert small.reach[0.9] > large.reach[0.9]


def test_contributions_of_a_border_and_negative_ones_do_not_count():
    images = [sample([[10, 10, 20, 20], [30, 30, 40, 40]], [2, 1])]
    result = object_receptive_fields(Counter(), images, sizes=())
    (group,) = result.groups
    assert (group.name, group.objects) == ("all sizes", 1)  # the gradient of class 2 is negative everywhere
    edge = object_receptive_fields(Counter(blur=9), [sample([[0, 0, 8, 8]])], sizes=()).groups[0]
    assert edge.field[: CELLS // 2 - 9].sum() == 0  # above the image


def test_boxes_are_scaled_from_the_file_to_the_image():
    small = object_receptive_fields(Counter(), [sample([[8, 8, 24, 24]])])
    file = sample([[24, 16, 72, 48]], size=(64, 96)) | {"size": torch.tensor([128, 288])}
    scaled = object_receptive_fields(Counter(), [file])
    assert scaled.groups[0].side == small.groups[0].side == 16
    assert scaled.groups[0].inside == pytest.approx(1)
    np.testing.assert_allclose(scaled.groups[0].field, small.groups[0].field, atol=1e-12)


def test_crowds_empty_boxes_and_objects_beyond_the_count_are_left_out():
    crowd = torch.tensor([True, False, False, False])
    boxes = [[0, 0, 20, 20], [5, 5, 5, 9], [10, 10, 20, 20], [30, 30, 50, 50]]
    images = [sample(boxes, crowd=crowd), None, sample([[1, 1, 9, 9]] * 5), sample([])]
    result = object_receptive_fields(Counter(), images, sizes=(15,), count=3)
    assert [group.objects for group in result.groups] == [3, 1]
    assert result.about["images"] == 3
    with pytest.raises(ValueError, match="there are no objects in 1 images"):
        object_receptive_fields(Counter(), [sample([])])


@pytest.fixture(scope="module")
def fcos():
    torch.manual_seed(0)
    return dense.FCOS("test_resnet", 3, neck_channels=64, num_convs=1).double().eval()


def test_the_field_of_a_score_is_the_gradient_of_its_logit(fcos):
    given = sample([[10, 8, 42, 40], [50, 20, 60, 44]], [1, 2])
    (group,) = object_receptive_fields(fcos, [given], sizes=(), extent=8).groups
    fields = []
    for box, label in zip(given["boxes"], given["labels"].tolist(), strict=True):
        leaf = given["image"][None].clone().requires_grad_()
        logits = fcos.box_scores(fcos.maps(leaf), [box[None]]).logits
        gradient = torch.autograd.grad(logits[0, label], leaf)[0].clamp(min=0)[0].sum(0)
        fields.append(gradient / gradient.sum())
    first = fields[0].numpy()
    expected = [float(field[int(y0) : int(y1), int(x0) : int(x1)].sum()) for field, (x0, y0, x1, y1) in
                zip(fields, given["boxes"].tolist(), strict=True)]  # fmt: skip
    assert group.inside == pytest.approx(np.mean(expected), rel=1e-9)
    np.testing.assert_allclose(group.example.field, first / first.max(), rtol=1e-5, atol=1e-7)


def test_the_unit_in_the_middle_leaves_the_head_out(fcos):
    given = sample([[8, 8, 56, 56]], [1], size=(64, 64))
    (group,) = object_receptive_fields(fcos, [given], sizes=(), unit="center").groups
    leaf = given["image"][None].clone().requires_grad_()
    maps = fcos.maps(leaf)
    gradient = torch.autograd.grad(maps[0][0, :, 4, 4].sum(), leaf)[0].clamp(min=0)[0].sum(0)  # 48 / 14 < 8: the finest
    np.testing.assert_allclose(group.example.field, (gradient / gradient.max()).numpy(), rtol=1e-5, atol=1e-7)
    assert "unit of the neck" in str(object_receptive_fields(fcos, [given], unit="center").about)


def test_models_are_drawn_below_each_other_and_saved(tmp_path, fcos):
    images = [sample([[4, 8, 12, 16], [20, 10, 60, 50]], [0, 1])]
    several = {
        "blur 1": object_receptive_fields(Counter(), images, sizes=(16,), name="a", classes=("cat", "dog", "owl")),
        "blur 9": object_receptive_fields(Counter(blur=9), images[:1], sizes=(16,), name="b"),
        "FCOS": object_receptive_fields(fcos, [sample([[4, 8, 12, 16]])], sizes=(16,), name="c"),
    }
    figures = type(several["FCOS"]).figures(several)
    assert len(figures) == 2
    for figure in figures.values():
        assert len(figure.axes) >= 6
    content = several["blur 1"].save(tmp_path / "x.json").read_text()
    found = json.loads(content)["results"]["a"]["groups"]
    assert np.array(found[0]["field"]).shape == (CELLS, CELLS)
    assert "example" not in found[0]
    rows = several["blur 1"].rows()
    assert rows[0]["inside the box"] == "100%"
    assert several["blur 1"].save(tmp_path / "x.html").read_text().count("<svg ") == 2


def test_the_model_is_left_as_it_was(fcos):
    fcos.train()
    object_receptive_fields(fcos, [sample([[4, 8, 32, 36]])])
    assert fcos.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in fcos.parameters())
    fcos.eval()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"unit": "middle"}, ValueError, "unit"),
        ({"sizes": (32, 16)}, ValueError, "increasing order"),
        ({"extent": 0.2}, ValueError, "extent must be at least 0.5"),
        ({"count": 0}, ValueError, "count"),
    ],
)
def test_arguments_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        object_receptive_fields(Counter(), [sample([[4, 8, 12, 16]])], **options)


def test_other_models_and_plain_images_are_refused():
    with pytest.raises(ValueError, match=r"needs a detector of widefield\.dense"):
        object_receptive_fields(nn.Conv2d(3, 8, 3), [sample([[4, 8, 12, 16]])])
    with pytest.raises(TypeError, match="samples with boxes"):
        object_receptive_fields(Counter(), torch.zeros(2, 3, 32, 32))


def test_words_hold_the_numbers_of_each_size():
    images = [sample([[40, 28, 48, 36], [24, 8, 72, 56]])]
    result = object_receptive_fields(Counter(blur=9), images, sizes=(16,), name="blurred")
    small, large = result.groups
    words = type(result).reading({"blurred": result})
    assert words == (
        f"blurred: of the contributions to an object below 16 px, {(1 - 2 / 9 * 10 / 8) ** 2:.0%} come from inside its "
        f"box and 90% from a box {small.reach[0.9]:.1f} times as wide and high (1 object); to an object of 16 px and "
        f"more, {(1 - 2 / 9 * 10 / 48) ** 2:.0%} and {large.reach[0.9]:.1f} times (1 object). Relative to its box, an "
        "object below 16 px is seen with more of its surroundings."
    )
    assert result.summary() == f"{words}\nblurred: images 1, of each object class logit of its box, extent 3.0."


def test_words_on_one_size_and_on_objects_that_are_not_found():
    one = object_receptive_fields(Counter(), [sample([[4, 8, 12, 16]])], sizes=(), name="a")
    assert (
        type(one).reading({"b": one}).startswith("b: of the contributions to an object, 100% come from inside its box")
    )
    assert "surroundings" not in one.summary()
    assert "hardly finds" not in one.summary()  # a sum of positive pixels: a probability near 1
    (group,) = one.groups
    lost = replace(one, groups=(replace(group, probability=0.004),))
    assert "a probability of 0.4% on average: these are fields of objects that it hardly finds." in lost.summary()
