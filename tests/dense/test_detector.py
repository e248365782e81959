"""The base of detectors: one forward pass, checks of its arguments, frozen parts."""

import copy

import pytest
import timm
import torch
from torch import nn

from dense.networks import Maps
from widefield import dense
from widefield.surgery import anatomy


class Center(dense.Detector):
    """Find one object in the middle of each image: the smallest detector."""

    def __init__(self, backbone="test_resnet", *, masks=False, **options):
        maps = dense.feature_maps(backbone)
        neck = dense.FPN(maps.channels, 8)
        super().__init__(maps, neck, {"bbox_head": nn.Conv2d(8, 1, 1)}, num_classes=3, masks=masks, **options)

    def losses(self, maps, targets):
        self.seen = targets
        count = sum(int((~target.crowd).sum()) for target in targets)
        return {"loss": (self.bbox_head(maps[0]).mean() - count) ** 2}

    def detect(self, maps, sizes):
        assert [x.shape[0] for x in maps] == [len(sizes)] * len(maps)
        ones = maps[0].new_ones(1)
        boxes = [maps[0].new_tensor([[0.25 * w, 0.25 * h, 0.75 * w, 0.75 * h]]) for h, w in sizes]
        return [dense.Detections(box, ones, ones.long()) for box in boxes]


def objects(*boxes, labels=None, **fields):
    labels = torch.zeros(len(boxes), dtype=torch.long) if labels is None else torch.tensor(labels)
    return dense.Targets(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), labels, **fields)


BOX = (2.0, 4.0, 20.0, 30.0)


def test_training_gives_losses_and_evaluation_detections():
    model = Center()
    images = torch.randn(2, 3, 64, 96)
    losses = model(images, [objects(BOX), objects()])
    assert list(losses) == ["loss"]
    losses["loss"].backward()
    assert model.neck.lateral_convs[0].conv.weight.grad is not None
    found = model.eval()(images)
    assert [list(entry.boxes[0]) for entry in found] == [[24.0, 16.0, 72.0, 48.0]] * 2


def test_boxes_follow_the_sizes_of_images_and_files():
    model = Center().eval()
    images = torch.randn(2, 3, 64, 96)
    inner = [(64, 96), (40, 80)]
    assert model(images, sizes=inner)[1].boxes.tolist() == [[20.0, 10.0, 60.0, 30.0]]
    assert model(images, sizes=torch.tensor(inner))[1].boxes.tolist() == [[20.0, 10.0, 60.0, 30.0]]
    found = model(images, sizes=inner, out_sizes=[(128, 96), (20, 400)])
    assert found[0].boxes.tolist() == [[24.0, 32.0, 72.0, 96.0]]
    assert found[1].boxes.tolist() == [[100.0, 5.0, 300.0, 15.0]]


def test_heads_get_complete_targets():
    model = Center(masks=True).double()
    masks = torch.ones(1, 60, 50, dtype=torch.bool)
    model(torch.randn(1, 3, 64, 64, dtype=torch.float64), [objects(BOX, size=(60, 50), masks=masks)])
    (seen,) = model.seen
    assert seen.size == (60, 50)
    assert seen.crowd.tolist() == [False]
    assert seen.boxes.dtype == torch.float64
    assert seen.masks is masks
    model(torch.randn(1, 3, 64, 64, dtype=torch.float64), [objects(masks=torch.zeros(0, 64, 64, dtype=torch.bool))])
    assert model.seen[0].size == (64, 64)
    plain = Center()
    plain(torch.randn(1, 3, 64, 64), [objects(BOX, size=(60, 50), masks=masks)])
    assert plain.seen[0].masks is None


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, "needs targets: call model"),
        ([objects(BOX)], "2 images and 1 targets"),
        ([objects(BOX), {"boxes": 1}], r"targets\[1\] must be widefield.dense.Targets; got dict"),
        ([objects(BOX), dense.Targets(torch.zeros(0), torch.zeros(0))], r"targets\[1\].boxes must be \(M, 4\)"),
        ([objects(BOX, labels=[1, 2]), objects()], r"targets\[0\].labels must be \(1,\)"),
        ([objects(BOX, crowd=torch.zeros(3)), objects()], r"targets\[0\].crowd must be \(1,\)"),
        ([objects(BOX, crowd=torch.zeros(1)), objects()], r"targets\[0\].crowd must be bool; got torch.float32"),
        ([objects(BOX, labels=[0.7]), objects()], r"targets\[0\].labels must be integers; got torch.float32"),
        ([objects(BOX, labels=[3]), objects()], r"targets\[0\].labels\[0\] is 3; labels must be from 0 to 2"),
        ([objects(), objects(BOX, BOX, labels=[0, -1])], r"targets\[1\].labels\[1\] is -1"),
        ([objects(BOX, (5, 5, 5, 9)), objects()], r"targets\[0\].boxes\[1\] is \[5.0, 5.0, 5.0, 9.0\], without area"),
        ([objects((20, 30, 8, 8)), objects()], "without area.*x, y, width, height"),
        ([objects((2, 4, float("nan"), 8)), objects()], "without area"),
        ([objects((2, 4, float("inf"), 8)), objects()], "outside of the image"),
        ([objects((2, 4, 96.0, 65.5)), objects()], r"outside of the image of \(height, width\) \(64, 96\)"),
        ([objects((2, 4, 40, 40), size=(64, 32)), objects()], r"outside of the image of .* \(64, 32\)"),
        ([objects((-3, 4, 40, 40)), objects()], "outside of the image"),
        ([objects(BOX, size=(65, 96)), objects()], r"targets\[0\].size is \(65, 96\), larger than the padded images"),
        ([objects(BOX, size=(0, 96)), objects()], r"targets\[0\].size must be \(height, width\), both positive"),
    ],
)
def test_wrong_targets_are_refused(targets, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Center()(torch.zeros(2, 3, 64, 96), targets)


def test_masks_are_checked_where_they_are_learned():
    model = Center(masks=True)
    images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"targets\[0\].masks is None, and this model learns masks"):
        model(images, [objects(BOX)])
    masks = torch.ones(1, 64, 64, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"masks must be \(1, 60, 64\), one mask per box .* got \(1, 64, 64\)"):
        model(images, [objects(BOX, size=(60, 64), masks=masks)])


def test_masks_of_numbers_are_refused():
    """Masks of 0 and 255, which image files hold, would count every cell that they touch as covered."""
    masks = torch.full((1, 64, 64), 255, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"targets\[0\].masks must be bool; got torch.uint8. Write masks != 0"):
        Center(masks=True)(torch.zeros(1, 3, 64, 64), [objects(BOX, masks=masks)])


@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (1, 3, 0, 64)])
def test_images_without_a_pixel_are_refused(shape):
    with pytest.raises(ValueError, match="no pixels in images of shape"):
        Center().eval()(torch.zeros(shape))


def test_a_box_may_leave_the_image_by_the_rounding_of_its_size():
    assert Center()(torch.zeros(1, 3, 64, 64), [objects((-0.5, 0, 64.4, 64.0))])


def test_arguments_of_the_other_mode_are_refused():
    model = Center()
    images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(TypeError, match="for evaluation mode"):
        model(images, [objects(BOX)], sizes=[(64, 64)])
    with pytest.raises(TypeError, match=r"for training mode: call model.train"):
        model.eval()(images, [objects(BOX)])
    with pytest.raises(ValueError, match="larger than the padded images"):
        model(images, sizes=[(64, 65)])
    with pytest.raises(ValueError, match="1 images and 2 sizes"):
        model(images, sizes=[(64, 64)] * 2)
    with pytest.raises(ValueError, match="1 images and 2 out_sizes"):
        model(images, out_sizes=[(64, 64)] * 2)
    with pytest.raises(ValueError, match="Add the batch dimension"):
        model(images[0])


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext"])
@pytest.mark.parametrize("size", [(1, 1), (20, 31), (33, 47), (8, 100)])
def test_images_of_any_size(backbone, size):
    model = Center(backbone).eval()
    height, width = size
    found = model(torch.randn(1, 3, height, width))
    assert found[0].boxes.tolist() == [[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]]


def _frozen(model):
    return {name for name, p in model.backbone.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    "backbone",
    ["resnet18", "convnext_atto", "van_b0", "moganet_xtiny", lambda: timm.create_model("resnet18")],
    ids=["resnet18", "convnext_atto", "van_b0", "moganet_xtiny", "whole"],
)
@pytest.mark.parametrize("count", [1, 3])
def test_frozen_stages_do_not_change_in_training(backbone, count):
    torch.manual_seed(0)
    model = Center(backbone if isinstance(backbone, str) else backbone(), frozen_stages=count)
    frozen = _frozen(model)
    stages = anatomy(model.backbone)
    assert {stages.stage_of(name) for name in frozen} >= {0}
    assert set(model.backbone.state_dict()) > frozen
    before = copy.deepcopy(model.backbone.state_dict())
    maps = list(model.train().backbone.body(torch.randn(2, 3, 64, 64)))[-4:]
    assert [x.requires_grad for x in maps] == [False] * count + [True] * (4 - count)
    torch.stack([x.square().mean() for x in maps]).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad)
    after = model.backbone.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    modules = dict(model.backbone.named_modules())
    for name in after:
        owner = modules[name.rpartition(".")[0]]
        if name in frozen or not owner.training:
            assert name not in changed, name
    assert changed
    with torch.no_grad():
        first = model.eval().backbone(torch.ones(1, 3, 64, 64))[count - 1]
        assert torch.equal(first, model.train().backbone(torch.ones(1, 3, 64, 64))[count - 1])


def test_batch_norms_of_the_backbone_stay_in_evaluation_mode():
    model = Center("resnet18", norm_eval=True)
    before = copy.deepcopy(model.backbone.state_dict())
    model.train()(torch.randn(2, 3, 64, 64), [objects(BOX)] * 2)["loss"].backward()
    after = model.backbone.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not _frozen(model)
    other = Center("resnet18").train()
    other(torch.randn(2, 3, 64, 64), [objects(BOX)] * 2)
    assert int(other.backbone.state_dict()["body.bn1.num_batches_tracked"]) == 1


def test_frozen_modules_stay_frozen_after_evaluation_and_copies():
    model = copy.deepcopy(Center("resnet18", frozen_stages=1)).eval().train()
    assert not model.backbone.body.bn1.training
    assert not model.backbone.body.layer1[0].bn2.training
    assert model.backbone.body.layer2[0].bn2.training


def test_frozen_stages_need_known_stages():
    with pytest.raises(ValueError, match="frozen_stages=1 needs a backbone with as many stages"):
        Center(Maps(), frozen_stages=1)
    with pytest.raises(ValueError, match="frozen_stages=5"):
        Center("resnet18", frozen_stages=5)


def test_a_detector_without_its_methods_cannot_be_built():
    class Unfinished(dense.Detector):
        def losses(self, maps, targets):
            return {}

    with pytest.raises(TypeError, match="detect"):
        Unfinished()


def test_parts_follow_the_backbone():
    model = Center(timm.create_model("test_resnet", features_only=True).double())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
