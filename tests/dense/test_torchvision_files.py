"""Weights of torchvision's detectors load with their classes in order, and give torchvision's detections."""

from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from tolerances import FLOAT64, close
from widefield import dense
from widefield.dense.roi import batched, roi_features

CHANNELS = 64
IMAGES = torch.randn(1, 3, 128, 256, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def trunk():
    torch.manual_seed(5)
    return torchvision.models.resnet18(weights=None)


def pyramid(layers, extra):
    """Return torchvision's ResNet-18 with a narrow pyramid."""
    names = {f"layer{index}": str(place) for place, index in enumerate(layers)}
    widths = [64 * 2 ** (index - 1) for index in layers]
    return BackboneWithFPN(trunk(), names, widths, CHANNELS, extra)


def noisy(model, scale=0.1):
    """Return the model in float64 and evaluation mode, with weights (float32) that give various scores."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head" in name and parameter.ndim >= 2 and parameter.shape[0] != CHANNELS:
                value = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(value - value.mean(tuple(range(1, value.ndim)), keepdim=True))
            elif "bbox_reg.bias" in name:
                parameter.fill_(1.0)
    return model.double().eval()


def written(model, path):
    torch.save(model.state_dict(), path)
    return path


class Unchanged(nn.Module):
    """Stand for torchvision's resizing and normalization: images are used as they are."""

    def forward(self, images, targets=None):
        sizes = [tuple(image.shape[-2:]) for image in images]
        return detection.image_list.ImageList(torch.stack(list(images)), sizes), targets

    def postprocess(self, result, _sizes, _original):
        return result


def detected(theirs, ours):
    with torch.no_grad():
        (expected,) = theirs(list(IMAGES))
        (found,) = ours.double().eval()(IMAGES)
    return expected, found


# FCOS


def theirs_fcos(classes):
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5)
    body = pyramid((2, 3, 4), LastLevelP6P7(CHANNELS, CHANNELS))
    model = detection.FCOS(body, classes, anchor_generator=anchors, score_thresh=0.0, nms_thresh=0.6,
                            detections_per_img=50, topk_candidates=100_000)  # fmt: skip
    model.transform = Unchanged()
    return noisy(model)


def ours_fcos(classes, **options):
    settings = {"conv_bias": True, "centerness_on": "boxes", "distances": "relu", "point_offset": 0.0,
                "score_threshold": 0.0, "nms_threshold": 0.6, "max_per_image": 50, "candidates": 100_000}  # fmt: skip
    return dense.FCOS(trunk(), classes, neck_channels=CHANNELS, **{**settings, **options})


def test_fcos_gives_the_same_detections_with_the_settings_of_torchvision(tmp_path):
    theirs = theirs_fcos(7)
    ours = ours_fcos(6)
    report = dense.load_checkpoint(ours, written(theirs, tmp_path / "fcos.pth"))
    assert report.fresh == report.skipped == ()
    assert "converted from torchvision's" in str(report)
    expected, found = detected(theirs, ours)
    # torchvision does not train its class 0, and keeps boxes without area.
    rows = (expected["labels"] > 0) & (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(1)
    count = int(rows.sum())
    assert 20 < count <= len(found.boxes) == 50
    close(found.scores[:count], expected["scores"][rows] ** 2, FLOAT64)
    close(found.boxes[:count], expected["boxes"][rows], FLOAT64)
    assert torch.equal(found.labels[:count] + 1, expected["labels"][rows])
    assert len(found.labels.unique()) > 2


# RetinaNet


def theirs_retinanet(classes, norm):
    """Return torchvision's RetinaNet, as in its first or second version, with anchors that are not rounded."""
    sizes = tuple(tuple(8 * 2**level * 2 ** (i / 3) * 4 for i in range(3)) for level in range(5))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    own = dense.anchors.Anchors.octaves()
    anchors.cell_anchors = [torch.tensor(own.shapes(level), dtype=torch.float64) for level in range(5)]
    body = pyramid((2, 3, 4), LastLevelP6P7(512 if norm else CHANNELS, CHANNELS))
    head = detection.retinanet.RetinaNetHead(CHANNELS, 9, classes, norm_layer=norm)
    model = detection.RetinaNet(body, classes, anchor_generator=anchors, head=head, score_thresh=1e-9,
                                detections_per_img=60, topk_candidates=200)  # fmt: skip
    model.transform = Unchanged()
    noisy(model, 0.02)  # scores below 1, boxes of various sizes
    with torch.no_grad():  # so that the class 0, which torchvision does not train, is no candidate
        model.head.classification_head.cls_logits.bias.reshape(9, classes)[:, 0] = -90.0
    return model


@pytest.mark.parametrize("version", [1, 2])
def test_retinanet_gives_the_same_detections_with_the_published_anchors(version, tmp_path):
    theirs = theirs_retinanet(7, partial(nn.GroupNorm, 32) if version == 2 else None)
    settings = {1: {"extra": "on_output", "relu_before_extra": True}, 2: {"norm": "group", "relu_before_extra": True}}
    ours = dense.RetinaNet(
        trunk(), 6, neck_channels=CHANNELS, score_threshold=1e-9, max_per_image=60, candidates=200, **settings[version]
    )
    path = written(theirs, tmp_path / "retinanet.pth")
    info = dense.inspect_checkpoint(path)
    assert (info.detector, info.num_classes) == ("RetinaNet", 6)
    report = dense.load_checkpoint(ours, path)
    assert report.fresh == report.skipped == ()
    expected, found = detected(theirs, ours)
    rows = (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(1)  # torchvision keeps boxes without area
    count = int(rows.sum())
    assert 40 < count <= len(found.boxes)
    close(found.boxes[:count], expected["boxes"][rows], FLOAT64)
    close(found.scores[:count], expected["scores"][rows], FLOAT64)
    assert torch.equal(found.labels[:count] + 1, expected["labels"][rows])
    assert len(found.labels.unique()) > 2


# Faster and Mask R-CNN


class AlignedRoIs(nn.Module):
    """Take features of RoIs as OpenMMLab does: aligned, with as many samples as there are cells."""

    def __init__(self, size):
        super().__init__()
        self.output_size = (size, size)

    def forward(self, maps, boxes, _sizes):
        levels = [maps[name] for name in ("0", "1", "2", "3")]
        return roi_features(levels, batched(boxes), (4, 8, 16, 32), self.output_size[0])


def theirs_mask_rcnn(classes, *, published_rules=True):
    """Return torchvision's Mask R-CNN; with OpenMMLab's anchors and RoIAlign if asked."""
    anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    if published_rules:
        anchors.cell_anchors = [
            torch.tensor(dense.anchors.Anchors().shapes(level), dtype=torch.float64) for level in range(5)
        ]
    model = detection.MaskRCNN(
        pyramid((1, 2, 3, 4), LastLevelMaxPool()),
        rpn_anchor_generator=anchors,
        box_head=TwoMLPHead(CHANNELS * 49, 32),
        box_predictor=FastRCNNPredictor(32, classes),
        mask_head=MaskRCNNHeads(CHANNELS, (CHANNELS,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(CHANNELS, CHANNELS, classes),
        box_score_thresh=0.0,
        box_detections_per_img=30,
        rpn_post_nms_top_n_test=40,
    )
    model.transform = Unchanged()
    if published_rules:
        model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool = AlignedRoIs(7), AlignedRoIs(14)
    return noisy(model)


def ours_mask_rcnn(classes, kind=dense.MaskRCNN, **options):
    settings = {"neck_channels": CHANNELS, "box_channels": 32, "score_threshold": 0.0, "max_per_image": 30,
                "test_proposals": 40}  # fmt: skip
    return kind(trunk(), classes, **{**settings, **options})


def test_mask_rcnn_gives_the_same_detections_with_the_published_anchors_and_rois(tmp_path):
    theirs, ours = theirs_mask_rcnn(7), ours_mask_rcnn(6)
    report = dense.load_checkpoint(ours, written(theirs, tmp_path / "mask.pth"))
    assert set(report.loaded) == set(ours.state_dict())
    expected, found = detected(theirs, ours)
    assert len(found.boxes) == 30
    assert len(found.labels.unique()) > 2
    close(found.boxes, expected["boxes"], FLOAT64)
    close(found.scores, expected["scores"], FLOAT64)
    assert torch.equal(found.labels + 1, expected["labels"])
    close(found.masks, expected["masks"][:, 0], FLOAT64)


def test_faster_rcnn_takes_the_same_weights_without_masks(tmp_path):
    theirs, ours = theirs_mask_rcnn(7), ours_mask_rcnn(6, dense.FasterRCNN)
    del theirs.roi_heads.mask_head, theirs.roi_heads.mask_predictor
    path = written(theirs, tmp_path / "faster.pth")
    info = dense.inspect_checkpoint(path)
    assert (info.detector, info.backbone, info.num_classes, info.published) == ("FasterRCNN", "ResNet", 6, True)
    theirs.roi_heads.mask_roi_pool = None
    dense.load_checkpoint(ours, path)
    expected, found = detected(theirs, ours)
    close(found.boxes, expected["boxes"], FLOAT64)


def test_torchvision_as_it_is_differs(tmp_path):
    """Its anchors are rounded and its RoIAlign is shifted by half a cell, as the documentation says."""
    theirs, ours = theirs_mask_rcnn(7, published_rules=False), ours_mask_rcnn(6)
    dense.load_checkpoint(ours, written(theirs, tmp_path / "mask.pth"))
    expected, found = detected(theirs, ours)
    assert (found.boxes[:5] - expected["boxes"][:5]).abs().max() > 0.1


def test_a_model_of_80_classes_takes_the_categories_of_coco(tmp_path):
    theirs = theirs_mask_rcnn(91)
    path = written(theirs, tmp_path / "mask.pth")
    assert dense.inspect_checkpoint(path).num_classes == 80
    ours = ours_mask_rcnn(80)
    report = dense.load_checkpoint(ours, path)
    assert "the 80 categories of COCO were chosen from 91 outputs" in str(report)
    scores = theirs.roi_heads.box_predictor.cls_score.weight.float()
    boxes = theirs.roi_heads.box_predictor.bbox_pred.bias.float()
    masks = theirs.roi_heads.mask_predictor.mask_fcn_logits.bias.float()
    names = detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    ids = [index for index, name in enumerate(names) if name not in ("__background__", "N/A")]
    assert len(ids) == 80
    for label, index in enumerate(ids):
        assert torch.equal(ours.roi_head.bbox_head.fc_cls.weight[label], scores[index])
        assert torch.equal(
            ours.roi_head.bbox_head.fc_reg.bias[4 * label : 4 * label + 4], boxes[4 * index : 4 * index + 4]
        )
        assert ours.roi_head.mask_head.conv_logits.bias[label] == masks[index]
    assert torch.equal(ours.roi_head.bbox_head.fc_cls.weight[80], scores[0])
    every = ours_mask_rcnn(90)
    assert "categories" not in str(dense.load_checkpoint(every, path))
    assert torch.equal(every.roi_head.bbox_head.fc_cls.weight[89], scores[90])


def old_names(state):
    """Return the names of files from before 2022."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for block in ("inner_blocks", "layer_blocks"):
            for index in range(4):
                key = key.replace(f"{block}.{index}.0.", f"{block}.{index}.")
        for index in range(4):
            key = key.replace(f"roi_heads.mask_head.{index}.0.", f"roi_heads.mask_head.mask_fcn{index + 1}.")
        if not key.endswith("num_batches_tracked"):  # norms are frozen
            renamed[key] = value
    return renamed


def test_files_with_the_old_names_and_frozen_norms_load(tmp_path):
    theirs, one, other = theirs_mask_rcnn(7), ours_mask_rcnn(6), ours_mask_rcnn(6)
    dense.load_checkpoint(one, written(theirs, tmp_path / "new.pth"))
    old = old_names(theirs.state_dict())
    assert "roi_heads.mask_head.mask_fcn4.bias" in old
    torch.save(old, tmp_path / "old.pth")
    dense.load_checkpoint(other, tmp_path / "old.pth")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("name", "hints"),
    [
        ("fasterrcnn_resnet50_fpn_v2", ["RPN has two convolutions", "feature pyramid has batch norms", "'4conv1fc'"]),
        ("retinanet_resnet50_fpn", ["The file holds a RetinaNet, the model is a FasterRCNN"]),
        ("fasterrcnn_mobilenet_v3_large_fpn", ["backbone"]),
    ],
)
def test_other_structures_are_refused_with_the_reason(name, hints, tmp_path):
    with torch.device("meta"):
        theirs = getattr(detection, name)(weights=None, weights_backbone=None)
        ours = dense.FasterRCNN("resnet50", 80)
    state = {key: torch.zeros(()).expand(value.shape) for key, value in theirs.state_dict().items()}
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"does not fit this FasterRCNN.*The model is unchanged") as caught:
        dense.load_checkpoint(ours, tmp_path / "file.pth")
    for hint in hints:
        assert hint in str(caught.value)
