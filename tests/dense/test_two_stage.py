"""Faster, Mask and Cascade R-CNN: losses, gradients and detections for images of any kind."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dense.networks import TWO_STAGE, cascade_mask_rcnn, cascade_rcnn, faster_rcnn, mask_rcnn, objects
from tolerances import FLOAT64, close
from widefield import bench, dense
from widefield.dense.boxes import BACKGROUND, IGNORED

BOXES = ((4.0, 6.0, 30.0, 40.0), (20.0, 10.0, 60.0, 62.0))
NAMES = {
    faster_rcnn: ["loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"],
    mask_rcnn: ["loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"],
    cascade_rcnn: [
        "loss_rpn_cls",
        "loss_rpn_bbox",
        *(f"s{i}.{n}" for i in range(3) for n in ("loss_cls", "loss_bbox")),
    ],
    cascade_mask_rcnn: [
        "loss_rpn_cls",
        "loss_rpn_bbox",
        *(f"s{i}.{n}" for i in range(3) for n in ("loss_cls", "loss_bbox", "loss_mask")),
    ],
}


def _images(count=2, size=(64, 64), dtype=torch.float32):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0)).to(dtype)


def _lowered(model):
    """Return a model whose fresh heads make detections: scores are low without training."""
    model.rules = dense.DetectionRules(0.01, 0.5, 20)
    return model


@pytest.mark.parametrize("build", TWO_STAGE)
def test_losses_of_training(build):
    torch.manual_seed(0)
    model = build()
    losses = model(_images(), [objects(*BOXES, labels=[0, 2]), objects(BOXES[0], labels=[1])])
    assert list(losses) == NAMES[build]
    assert all(value.shape == () and value.isfinite() and value >= 0 for value in losses.values())
    assert all(value > 0 for name, value in losses.items() if "rpn_bbox" not in name)
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("build", TWO_STAGE)
@pytest.mark.parametrize("crowd", [False, True])
def test_images_without_objects_teach_the_background(build, crowd):
    torch.manual_seed(0)
    model = build()
    empty = objects(*BOXES, crowd=torch.tensor([True, True])) if crowd else objects()
    losses = model(_images(), [empty] * 2)
    for name, value in losses.items():
        assert (value > 0) == ("cls" in name), name
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        if "fc_reg" in name or "mask_head" in name or "rpn_reg" in name:
            assert not p.grad.any(), name
    assert any(p.grad.any() for p in model.backbone.parameters())


@pytest.mark.parametrize("build", [mask_rcnn, cascade_rcnn])
def test_crowd_regions_may_be_left_out(build):
    torch.manual_seed(0)
    model = build(crowd_overlap=0.5)
    target = objects(BOXES[0], (32.0, 0.0, 64.0, 64.0), crowd=torch.tensor([False, True]))
    second = model.roi_head.assigners
    boxes = torch.tensor([BOXES[0], (36.0, 4.0, 60.0, 60.0), (0.0, 50.0, 20.0, 64.0)])
    for assigner in (model.rpn_head.assigner, *second):
        found = assigner(boxes, target.boxes[:1], target.boxes[1:])
        assert found.objects.tolist() == [0, IGNORED, BACKGROUND]
    assert build().rpn_head.assigner(boxes, target.boxes[:1], target.boxes[1:]).objects.tolist()[1] == BACKGROUND
    assert all(value.isfinite() for value in model(_images(1), [target]).values())


@pytest.mark.parametrize("build", [mask_rcnn, cascade_mask_rcnn])
def test_distributed_training_waits_for_no_parameter(build):
    torch.manual_seed(0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(build("test_resnet"))
        for target in (objects(), objects(*BOXES), objects()):  # an unused parameter fails in the next step
            sum(model(_images(1), [target]).values()).backward()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("build", TWO_STAGE)
def test_detections(build):
    torch.manual_seed(0)
    model = _lowered(build()).eval()
    sizes, files = [(64, 96), (50, 70)], [(64, 96), (100, 35)]
    with torch.no_grad():
        found = model(_images(size=(64, 96)), sizes=sizes)
        scaled = model(_images(size=(64, 96)), sizes=sizes, out_sizes=files)
    for entry, (height, width) in zip(found, sizes, strict=True):
        assert 0 < len(entry.boxes) <= 20
        assert entry.labels.dtype == torch.int64
        assert set(entry.labels.tolist()) <= {0, 1, 2}
        assert (entry.scores.diff() <= 0).all()
        assert (entry.scores > 0.01).all()
        assert (entry.boxes >= 0).all()
        assert (entry.boxes <= torch.tensor([width, height, width, height])).all()
        if model.has_masks:
            assert entry.masks.shape == (len(entry.boxes), 28, 28)
            assert ((entry.masks > 0) & (entry.masks < 1)).all()
            assert dense.paste_masks(entry.masks, entry.boxes, (height, width)).shape == (
                len(entry.boxes),
                height,
                width,
            )
        else:
            assert entry.masks is None
    assert torch.equal(scaled[0].boxes, found[0].boxes)
    close(scaled[1].boxes, found[1].boxes * torch.tensor([0.5, 2, 0.5, 2]), 1e-6)
    assert torch.equal(scaled[1].scores, found[1].scores)


def test_hooks_see_what_layers_return():
    torch.manual_seed(0)
    model, seen, masks = _lowered(mask_rcnn()).eval(), [], []
    with torch.no_grad():
        plain = model(_images(1))[0]
        model.rpn_head.rpn_conv.register_forward_hook(lambda *call: seen.append(call[2]))
        model.roi_head.mask_head.conv_logits.register_forward_hook(lambda *call: masks.append(call[2]))
        found = model(_images(1))[0]
    assert min(x.min() for x in seen) < 0
    assert [x.shape[1:] for x in masks] == [(3, 28, 28)]
    close(found.masks, plain.masks, 1e-5)


@pytest.mark.parametrize("build", TWO_STAGE)
def test_nothing_may_be_found(build):
    model = build().eval()
    model.rules = dense.DetectionRules(1.0)
    found = model(_images(1))[0]
    assert found.boxes.shape == (0, 4)
    assert found.labels.shape == found.scores.shape == (0,)
    assert (found.masks is None) == (not model.has_masks)
    if model.has_masks:
        assert found.masks.shape == (0, 28, 28)


@pytest.mark.parametrize("build", TWO_STAGE)
def test_images_of_a_batch_do_not_influence_each_other(build):
    torch.manual_seed(0)
    model = _lowered(build()).double().eval()
    sizes = [(64, 96), (40, 90), (33, 35)]
    images = _images(3, (64, 96), torch.float64)
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:, height:], image[:, :, width:] = 0, 0
    with torch.no_grad():
        together = model(images, sizes=sizes)
        alone = [model(image[None], sizes=[size])[0] for image, size in zip(images, sizes, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert len(one.boxes) > 1
        assert torch.equal(one.labels, other.labels)
        for field in ("boxes", "scores", "masks"):
            if getattr(one, field) is not None:
                close(getattr(one, field), getattr(other, field), FLOAT64)


@pytest.mark.parametrize("build", TWO_STAGE)
@pytest.mark.parametrize("size", [(1, 1), (20, 31), (37, 150)])
def test_images_of_any_size(build, size):
    torch.manual_seed(0)
    model = build()
    box = (0.0, 0.0, float(size[1]), float(size[0]))
    losses = model(_images(2, size), [objects(box, size=size), objects(size=size)])
    assert all(value.isfinite() for value in losses.values())
    found = _lowered(model).eval()(_images(1, size))[0]
    assert (found.boxes <= torch.tensor([size[1], size[0], size[1], size[0]])).all()


@pytest.mark.parametrize("build", TWO_STAGE)
def test_autocast_keeps_boxes_and_losses_in_float32(build):
    torch.manual_seed(0)
    model = build()
    targets = [objects(*BOXES), objects()]
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(_images(), targets)
    torch.set_rng_state(state)
    exact = model(_images(), targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert abs(value - exact[name]) < 0.1 * max(1, exact[name]), name
    with torch.autocast("cpu", torch.bfloat16):
        found = _lowered(model).eval()(_images(1))[0]
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert found.masks is None or found.masks.dtype == torch.float32


@pytest.mark.parametrize("build", TWO_STAGE)
def test_training_is_random_by_the_seed_alone(build):
    model = build(rois_per_image=16)
    targets = [objects(*BOXES), objects(BOXES[1])]
    model.eval()  # so that no statistics of norms change
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            losses = model.losses(model.maps(_images()), model.prepared(_images(), targets))
        found.append(sum(losses.values()).item())
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_published_settings():
    faster, mask, cascade = faster_rcnn(), mask_rcnn(), cascade_rcnn()
    assert not faster.roi_head.assigners[0].low_quality
    assert mask.roi_head.assigners[0].low_quality
    assert [head.coder.stds[0] for head in cascade.roi_head.bbox_head] == [0.1, 0.05, 0.033]
    assert [assigner.positive for assigner in cascade.roi_head.assigners] == [0.5, 0.6, 0.7]
    assert faster.rpn_head.allowed_border is None
    assert cascade.rpn_head.allowed_border == 0
    assert (faster.rpn_head.for_training.max_per_image, cascade.rpn_head.for_training.max_per_image) == (1000, 2000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0}, "num_classes must be at least 1"),
        ({"box_head": "2fc"}, "box_head must be one of"),
        ({"score_threshold": 1.5}, "score_threshold must be from"),
        ({"rois_per_image": 0}, "must be at least 1; got 0"),
        ({"frozen_stage": 1}, "no|neither"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    for build in (faster_rcnn, cascade_rcnn):
        with pytest.raises((TypeError, ValueError), match=message):
            build(**options)


CONVNEXT_CASCADE = {"masks": True, "box_head": "4conv1fc", "class_agnostic": False, "box_loss": "giou"}


class _Counted(nn.Module):
    """Run a detector as mmdetection counts it: 1000 RoIs, 100 masks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        maps = self.model.maps(x)
        self.model.rpn_head(maps)
        channels = maps[0].shape[1]
        for heads, count, side in ((self.model.roi_head.box_heads, 1000, 7), (self.model.roi_head.mask_heads, 100, 14)):
            for head in heads:
                head(x.new_zeros(count, channels, side, side))
        return maps


@pytest.mark.parametrize(
    ("name", "kind", "options", "parameters", "macs"),
    [
        ("convnext_tiny", dense.MaskRCNN, {}, 48.10, 261.9),
        ("resnet50", dense.MaskRCNN, {}, 44.40, 259.3),
        ("convnext_tiny", dense.CascadeRCNN, CONVNEXT_CASCADE, 85.93, 740.3),
    ],
)
def test_parameters_and_macs_of_published_tables(name, kind, options, parameters, macs):
    with torch.device("meta"):
        model = kind(name, 80, **options).eval()
        found = bench.cost(_Counted(model), torch.zeros(1, 3, 800, 1280))
    assert round(found.parameters / 1e6, 2) == parameters
    assert abs(found.macs / 1e9 - macs) < 0.2  # the tables add up to seven rounded parts
