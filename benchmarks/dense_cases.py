"""The calls that dense.py times: our functions next to torchvision's, torchmetrics', pycocotools' or a plain formula.

Each function of ``PARTS`` yields cases, (name, ours, name of the peer, peer), on the same inputs. Images have 800x1333
pixels and are padded to 800x1344, as in published detectors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import ops
from torchvision.models import detection as peer
from torchvision.models.detection import _utils as peer_utils
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image, project_masks_on_boxes
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from widefield.data.object_masks import POLYGONS, Outlines, fifths
from widefield.data.skeleton import Skeleton
from widefield.dense import DetectionRules, Detections, FCOSHead, HeatmapCodec, RetinaHead, Targets, largest_at, segment
from widefield.dense.anchors import Anchors, points
from widefield.dense.box_head import BoxHead, probabilities
from widefield.dense.boxes import Assigner, nms_by_label
from widefield.dense.fcos import FCOSOutputs
from widefield.dense.mask_head import mask_targets, paste_masks
from widefield.dense.retinanet import RetinaOutputs
from widefield.dense.roi import RoISample, batched, for_rois, roi_features
from widefield.dense.rpn import RPNHead, RPNOutputs
from widefield.predictions.coco_results import run_lengths
from widefield.tasks.coco_metric import CocoMetric, TrueObjects
from widefield.tasks.confusion import Confusion
from widefield.tasks.pose_metric import FoundPoses, People, PoseMetric, TruePoses

Call = Callable[[], object]
Case = tuple[str, Call, str, Call | None]
"""Name, ours, name of the peer, the peer's; None if there is no peer."""

CLASSES = 80
SIZE, PADDED = (800, 1333), (800, 1344)
FILE = (480, 640)
"""A usual size of COCO's files."""
STRIDES = (4, 8, 16, 32, 64)
THRESHOLD = 0.5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_boxes(count: int, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    """Return boxes (count, 4) with sides from 8 to 400 pixels, uniform in the logarithm."""
    g = generator(seed)
    sides = torch.exp(torch.empty(count, 2).uniform_(np.log(8), np.log(400), generator=g))
    limit = torch.tensor([size[1], size[0]]) - 1.0
    sides = sides.minimum(limit - 1)
    corner = (limit - sides) * torch.rand(count, 2, generator=g)
    return torch.cat((corner, corner + sides), 1)


def candidates(count: int, labels: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes, scores and labels of ``count`` candidates around 60 objects, half of them of the object's class."""
    g = generator(1)
    objects, owner = random_boxes(60), torch.randint(60, (count,), generator=g)
    sides = (objects[:, 2:] - objects[:, :2]).repeat(1, 2)[owner]
    boxes = objects[owner] + 0.15 * sides * torch.randn(count, 4, generator=g)
    boxes = torch.cat((torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:]) + 1), 1)
    other = torch.rand(count, generator=g) < 0.5
    kinds = torch.where(other, torch.randint(labels, (count,), generator=g), owner % labels)
    return boxes, torch.rand(count, generator=g), kinds


def maps_of(channels: int, strides: tuple[int, ...], mean: float, std: float, batch: int = 1) -> list[Tensor]:
    """Return random maps (batch, channels, H_i, W_i) of a padded image."""
    g = generator(2)
    return [
        mean + std * torch.randn(batch, channels, -(-PADDED[0] // s), -(-PADDED[1] // s), generator=g) for s in strides
    ]


def matched(matcher: Any, objects: Tensor, boxes: Tensor) -> Tensor:
    """Return the matches of torchvision's detectors; they treat images without objects by themselves."""
    if not len(objects):
        return torch.full((len(boxes),), -1)
    found: Tensor = matcher(ops.box_iou(objects, boxes))
    return found


class _Bare(nn.Module):
    """What torchvision's detectors need of a backbone when only their decoding is called."""

    out_channels = 8


# Detectors


def suppression() -> Iterator[Case]:
    for count in (1_000, 10_000, 100_000):
        given = candidates(count)
        yield (
            f"NMS of {count:,} candidates, {CLASSES} classes",
            functools.partial(nms_by_label, *given, THRESHOLD),
            "torchvision batched_nms",
            functools.partial(ops.batched_nms, *given, THRESHOLD),
        )
    g = generator(3)
    logits = torch.randn(1000, CLASSES + 1, generator=g)
    logits[:, -1] += 4
    logits[torch.arange(1000), torch.randint(CLASSES, (1000,), generator=g)] += 5
    deltas, proposals = 0.5 * torch.randn(1000, 4 * CLASSES, generator=g), candidates(1000)[0]
    head, rules = BoxHead(8, CLASSES, roi_size=1, channels=8), DetectionRules()
    theirs = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, None, 0.05, THRESHOLD, 100)
    first = torch.cat((logits[:, -1:], logits[:, :-1]), 1)  # torchvision has the background first
    moved = torch.cat((deltas.new_zeros(1000, 4), deltas), 1)
    yield (
        f"detections from 1,000 RoIs, {CLASSES} classes",
        lambda: rules.of_rois(head.decode(proposals, deltas, SIZE), probabilities(logits)),
        "torchvision",
        lambda: theirs.postprocess_detections(first, moved, [proposals], [SIZE]),
    )
    yield proposals_of_rpn()
    yield retinanet_detections()
    yield fcos_detections()


def proposals_of_rpn() -> Case:
    rpn = RPNHead(8)
    outputs = RPNOutputs(maps_of(3, STRIDES, -4, 2), maps_of(12, STRIDES, 0, 0.3))
    counts = {"training": 1000, "testing": 1000}
    theirs = RegionProposalNetwork(nn.Identity(), nn.Identity(), 0.7, 0.3, 256, 0.5, counts, counts, 0.7).eval()
    anchors = torch.cat(rpn.anchors.grid(outputs.objectness))
    lengths = [x[0].numel() for x in outputs.objectness]

    def run() -> object:
        objectness, deltas = concat_box_prediction_layers(outputs.objectness, outputs.deltas)
        boxes = theirs.box_coder.decode(deltas, [anchors]).view(1, -1, 4)
        return theirs.filter_proposals(boxes, objectness, [SIZE], lengths)

    name = f"proposals from {len(anchors):,} anchors"
    return name, lambda: rpn.proposals(outputs, [SIZE], training=False), "torchvision", run


def by_place(x: Tensor, values: int) -> Tensor:
    """Return outputs as torchvision's heads do, (N, H * W * A, values)."""
    n, _, height, width = x.shape
    return x.view(n, -1, values, height, width).permute(0, 3, 4, 1, 2).reshape(n, -1, values)


def retinanet_detections() -> Case:
    strides = (8, 16, 32, 64, 128)
    outputs = RetinaOutputs(maps_of(9 * CLASSES, strides, -7, 1.2), maps_of(36, strides, 0, 0.3))
    head = RetinaHead(8, CLASSES, channels=8)
    anchors = head.anchors.grid(outputs.logits)
    generated = AnchorGenerator(((32,),) * 5, ((0.5, 1.0, 2.0),) * 5)
    theirs = peer.RetinaNet(_Bare(), CLASSES, head=nn.Identity(), anchor_generator=generated)

    def run() -> object:
        said = {
            "cls_logits": [by_place(x, CLASSES) for x in outputs.logits],
            "bbox_regression": [by_place(x, 4) for x in outputs.deltas],
        }
        return theirs.postprocess_detections(said, [anchors], [SIZE])

    rules = DetectionRules()
    return "RetinaNet's detections", lambda: head.detections(outputs, [SIZE], rules), "torchvision", run


def fcos_detections() -> Case:
    strides = (8, 16, 32, 64, 128)
    outputs = FCOSOutputs(
        maps_of(CLASSES, strides, -7, 1.8), [x.exp() for x in maps_of(4, strides, 4, 0.5)], maps_of(1, strides, 0, 1)
    )
    head = FCOSHead(32, CLASSES, channels=32)
    grids = points(outputs.logits, strides)
    anchors = [torch.cat((grid - s / 2, grid + s / 2), 1) for grid, s in zip(grids, strides, strict=True)]
    theirs = peer.FCOS(_Bare(), CLASSES, head=nn.Identity(), score_thresh=0.05**0.5 / 2, nms_thresh=THRESHOLD)
    relative = [x / s for x, s in zip(outputs.distances, strides, strict=True)]

    def run() -> object:
        parts = (outputs.logits, CLASSES), (relative, 4), (outputs.centerness, 1)
        names = ("cls_logits", "bbox_regression", "bbox_ctrness")
        said = {name: [by_place(x, n) for x in maps] for name, (maps, n) in zip(names, parts, strict=True)}
        return theirs.postprocess_detections(said, [anchors], [SIZE])

    rules = DetectionRules()
    return "FCOS's detections", lambda: head.detections(outputs, [SIZE], rules), "torchvision", run


def assignment() -> Iterator[Case]:
    like = maps_of(1, STRIDES, 0, 1)
    anchors = torch.cat(Anchors().grid(like))
    retina = torch.cat(Anchors.octaves().grid(maps_of(1, (8, 16, 32, 64, 128), 0, 1)))
    proposals = candidates(2000)[0]
    for count in (0, 10, 100):
        objects = random_boxes(count, seed=4)
        for what, boxes, settings in (
            (f"{len(anchors):,} anchors of an RPN", anchors, (0.7, 0.3, 0.3, True)),
            (f"{len(retina):,} anchors of RetinaNet", retina, (0.5, 0.4, 0.0, True)),
            ("2,000 proposals", proposals, (0.5, 0.5, 0.5, False)),
        ):
            positive, negative, _, low = settings
            matcher = peer_utils.Matcher(positive, negative, allow_low_quality_matches=low)
            yield (
                f"{count} objects to {what}",
                functools.partial(Assigner(*settings), boxes, objects),
                "torchvision Matcher",
                functools.partial(matched, matcher, objects, boxes),
            )
        yield fcos_assignment(objects)


def fcos_assignment(objects: Tensor) -> Case:
    head = FCOSHead(32, CLASSES, channels=32, center_radius=1.5)
    like = maps_of(1, head.strides, 0, 1)
    labels = torch.zeros(len(objects), dtype=torch.long)
    grids = points(like, head.strides)
    anchors = torch.cat([torch.cat((g - s / 2, g + s / 2), 1) for g, s in zip(grids, head.strides, strict=True)])
    theirs = peer.FCOS(_Bare(), CLASSES, head=_Matches())
    targets, lengths = [{"boxes": objects, "labels": labels}], [len(grid) for grid in grids]
    return (
        f"{len(objects)} objects to {len(anchors):,} points of FCOS",
        lambda: head.targets(like, objects, labels),
        "torchvision FCOS",
        lambda: theirs.compute_loss(targets, {}, [anchors], lengths),
    )


class _Matches(nn.Module):
    """A head of torchvision's FCOS that returns what the points learn, in place of losses."""

    def compute_loss(self, targets: Any, outputs: object, anchors: object, matches: Any) -> Any:
        found = []
        for target, places in zip(targets, matches, strict=True):
            if not len(target["labels"]):
                found.append((target["labels"].new_zeros(len(places)), target["boxes"].new_zeros(len(places), 4)))
                continue
            labels = target["labels"][places.clip(min=0)]
            labels[places < 0] = -1
            found.append((labels, target["boxes"][places.clip(min=0)]))
        return found


def regions() -> Iterator[Case]:
    maps, rois = maps_of(256, STRIDES[:4], 0, 1), random_boxes(1000, seed=5)
    named = {str(i): x for i, x in enumerate(maps)}
    for count, size in ((1000, 7), (100, 14)):
        boxes = rois[:count]
        pool = ops.MultiScaleRoIAlign(list(named), size, 0)
        yield (
            f"RoIAlign {size}x{size} of {count:,} RoIs",
            functools.partial(roi_features, for_rois(maps, STRIDES[:4]), batched([boxes]), STRIDES[:4], size),
            "torchvision MultiScaleRoIAlign",
            functools.partial(pool, named, [boxes], [SIZE]),
        )
    learned = [x.clone().requires_grad_() for x in maps]
    pool, boxes = ops.MultiScaleRoIAlign(list(named), 7, 0), rois[:512]

    def step(run: Callable[[], Tensor]) -> object:
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(run().sum(), learned, allow_unused=True)

    yield (
        "RoIAlign 7x7 of 512 RoIs, forward and backward",
        lambda: step(lambda: roi_features(learned, batched([boxes]), STRIDES[:4], 7)),
        "torchvision MultiScaleRoIAlign",
        lambda: step(lambda: pool({str(i): x for i, x in enumerate(learned)}, [boxes], [SIZE])),
    )


def ellipses(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks (M, H, W) that are ellipses inside boxes."""
    y, x = (torch.arange(side) + 0.5 for side in size)
    center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    across = ((x - center[:, :1]) / half[:, :1]) ** 2
    return across[:, None] + (((y - center[:, 1:]) / half[:, 1:]) ** 2)[..., None] <= 1


def masks() -> Iterator[Case]:
    boxes = random_boxes(100, seed=6)
    small = F.interpolate(torch.rand(100, 1, 7, 7, generator=generator(6)), (28, 28), mode="bilinear")[:, 0]
    yield (
        "pasting 100 masks into 800x1333",
        lambda: paste_masks(small, boxes, SIZE),
        "torchvision paste_masks_in_image",
        lambda: paste_masks_in_image(small[:, None], boxes, SIZE) >= THRESHOLD,
    )
    for objects in (10, 100):
        own = random_boxes(objects, seed=7)
        whole, places = ellipses(own, SIZE), torch.arange(128) % objects
        rois = own[places] + 3 * torch.randn(128, 4, generator=generator(7))
        sample = RoISample(rois, places, places, own[places], torch.zeros(128, dtype=torch.bool))
        target = Targets(own, torch.zeros(objects).long(), whole, torch.zeros(objects, dtype=torch.bool), SIZE)
        yield (
            f"targets of 128 masks, {objects} objects",
            functools.partial(mask_targets, sample, target, 28),
            "torchvision project_masks_on_boxes",
            functools.partial(project_masks_on_boxes, whole, rois, places, 28),
        )
    from pycocotools import mask as coco

    found = ellipses(boxes, SIZE).numpy()
    yield (
        "run lengths of 100 masks of 800x1333",
        lambda: [run_lengths(mask) for mask in found],
        "pycocotools encode",
        lambda: coco.encode(np.asfortranarray(found.transpose(1, 2, 0).view(np.uint8))),
    )
    yield polygons()


def polygons() -> Case:
    """Return the masks of 7 objects with 25 corners each, as in COCO."""
    from pycocotools import mask as coco

    boxes = random_boxes(7, FILE, seed=8)
    angle = torch.arange(25) * (2 * np.pi / 25)
    circle = torch.stack((angle.cos(), angle.sin()), 1) * (0.8 + 0.2 * torch.rand(25, 1, generator=generator(8)))
    corners = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2 + (boxes[:, None, 2:] - boxes[:, None, :2]) / 2 * circle
    outlines = [[round(value, 2) for value in one.flatten().tolist()] for one in corners]
    starts = np.arange(8)
    values = np.array([fifths(one) for one in outlines], np.int32)
    ours = Outlines(np.full(7, POLYGONS, np.uint8), starts, starts * values.shape[1], values.ravel())

    def run() -> object:
        return np.stack([coco.decode(coco.merge(coco.frPyObjects([one], *FILE))) for one in outlines])

    return "masks of 7 polygons in 480x640", lambda: ours.masks(0, 7, *FILE), "pycocotools frPyObjects", run


# Segmentation


class _Given(nn.Module):
    """A network that costs nothing: it returns the same logits for each window."""

    def __init__(self, classes: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.randn(1, classes, *size, generator=generator(9)))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[:, :, : x.shape[2], : x.shape[3]]


def stitched(model: nn.Module, images: Tensor, window: int, stride: int) -> Tensor:
    """Return mean logits as mmsegmentation's ``slide_inference`` computes them."""
    height, width = images.shape[2:]
    rows, columns = (max(side - window + stride - 1, 0) // stride + 1 for side in (height, width))
    total, count = images.new_zeros(()), images.new_zeros(1, 1, height, width)
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride + window, height), min(column * stride + window, width)
            top, left = max(bottom - window, 0), max(right - window, 0)
            logits = model(images[:, :, top:bottom, left:right])
            total = total + F.pad(logits, (left, width - right, top, height - bottom))
            count[:, :, top:bottom, left:right] += 1
    return total / count


def segmentation() -> Iterator[Case]:
    for classes, size in ((150, (512, 683)), (150, (512, 1024)), (19, (1024, 1024))):
        model, images = _Given(classes, (512, 512)).eval(), torch.zeros(1, 3, *size)
        yield (
            f"stitching windows of 512, {classes} classes, {size[0]}x{size[1]}",
            functools.partial(segment, model, images, window=512, stride=341),
            "mmsegmentation's formula",
            functools.partial(stitched, model, images, 512, 341),
        )
    logits = torch.randn(1, 150, 128, 171, generator=generator(10))
    yield (
        "classes at 512x683 from logits of 128x171, 150 classes",
        lambda: largest_at(logits, (512, 683)),
        "interpolate and argmax",
        lambda: F.interpolate(logits, (512, 683), mode="bilinear").argmax(1),
    )
    from torchmetrics.classification import MulticlassConfusionMatrix

    for classes in (19, 150):
        g = generator(11)
        small = torch.randint(classes, (1, 1, 32, 128), generator=g).float()
        true = F.interpolate(small, (512, 2048), mode="nearest")[0].long()
        wrong = torch.rand(true.shape, generator=g) < 0.2
        mine = torch.where(wrong, torch.randint(classes, true.shape, generator=g), true)
        true[:, :20] = 255
        ours = Confusion([str(i) for i in range(classes)])
        theirs = MulticlassConfusionMatrix(classes, ignore_index=255, validate_args=False)
        yield (
            f"confusion matrix of {classes} classes at 512x2048",
            functools.partial(ours.update, mine, true),
            "torchmetrics",
            functools.partial(theirs.update, mine, true),
        )


# Metrics of objects and poses


def metrics() -> Iterator[Case]:
    from torchmetrics.detection import MeanAveragePrecision

    for kind, images in (("boxes", 50), ("masks", 10)):
        preds, target, theirs_preds, theirs_target = [], [], [], []
        for image in range(images):
            boxes, labels = random_boxes(7, FILE, 20 + image), torch.arange(7) * 5 + image % 10
            g = generator(image)
            places = torch.randint(7, (100,), generator=g)
            moved = boxes[places] + 8 * torch.randn(100, 4, generator=g)
            moved = torch.cat((moved[:, :2], torch.maximum(moved[:, 2:], moved[:, :2] + 1)), 1)
            scores = torch.rand(100, generator=g).sort(descending=True).values
            kinds = torch.where(torch.rand(100, generator=g) < 0.7, labels[places], 3)
            own, true = (ellipses(moved, FILE), ellipses(boxes, FILE)) if kind == "masks" else (None, None)
            preds.append(Detections(moved, scores, kinds, own))
            target.append(TrueObjects(boxes, labels, FILE, masks=true))
            theirs_preds.append({"boxes": moved, "scores": scores, "labels": kinds, "masks": own})
            theirs_target.append({"boxes": boxes, "labels": labels, "masks": true})

        def ours(kind: str = kind, preds: Any = preds, target: Any = target) -> object:
            metric = CocoMetric([str(i) for i in range(CLASSES)], masks=kind == "masks")
            metric.update(preds, target)
            return metric.compute()

        def theirs(kind: str = kind, preds: Any = theirs_preds, target: Any = theirs_target) -> object:
            metric = MeanAveragePrecision(iou_type=("bbox", "segm") if kind == "masks" else "bbox")
            metric.warn_on_many_detections = False
            metric.update(preds, target)
            return metric.compute()

        yield f"COCO's metrics of {images} images, {kind}", ours, "torchmetrics (pycocotools)", theirs


def read_one_by_one(heatmaps: Tensor) -> np.ndarray:
    """Return key points as mmpose's code for "msra" reads them: one key point after the other."""
    maps = heatmaps.numpy()
    count, keypoints, height, width = maps.shape
    found = np.zeros((count, keypoints, 2), np.float32)
    for n in range(count):
        for k in range(keypoints):
            heat = maps[n, k]
            y, x = divmod(int(heat.argmax()), width)
            found[n, k] = x, y
            if 1 < x < width - 1 and 1 < y < height - 1:
                slopes = heat[y, x + 1] - heat[y, x - 1], heat[y + 1, x] - heat[y - 1, x]
                found[n, k] += 0.25 * np.sign(slopes)
    return found * 4


def poses() -> Iterator[Case]:
    heatmaps = torch.rand(64, 17, 64, 48, generator=generator(12)) ** 8
    for kind in ("msra", "unbiased", "udp"):
        codec = HeatmapCodec((256, 192), (64, 48), kind=kind)
        plain = functools.partial(read_one_by_one, heatmaps) if kind == "msra" else None
        name = "one by one (mmpose)" if plain else ""
        yield f"reading 64 x 17 heatmaps, {kind}", functools.partial(codec.decode, heatmaps), name, plain
    codec = HeatmapCodec((256, 192), (64, 48))
    places = torch.rand(64, 17, 2, generator=generator(13)) * torch.tensor([192.0, 256.0])
    yield "writing 64 x 17 heatmaps", lambda: codec.encode(places, torch.ones(64, 17)), "", None
    images = [posed(image) for image in range(100)]

    def run() -> object:
        metric = PoseMetric(["person"], Skeleton.load("coco"))
        for image in images:
            metric.update(*image)
        return metric.compute()

    yield "metrics of poses, 100 images of 20 poses", run, "", None


def posed(image: int) -> tuple[FoundPoses, TruePoses]:
    """Return 20 poses of an image with 4 people."""
    g, boxes = generator(image), random_boxes(4, FILE, image)
    spread = boxes[:, None, :2] + torch.rand(4, 17, 2, generator=g) * (boxes[:, 2:] - boxes[:, :2])[:, None]
    true = torch.cat((spread, torch.full((4, 17, 1), 2.0)), 2)
    owner, zeros = torch.arange(20) % 4, torch.zeros(20).long()
    found = spread[owner] + 4 * torch.randn(20, 17, 2, generator=g)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    scores, places = torch.rand(20, generator=g), torch.full((20,), image)
    people = People(true, boxes, areas, zeros[:4], torch.zeros(4, dtype=torch.bool))
    nobody = People(true[:0], boxes[:0], areas[:0], zeros[:0], torch.zeros(0, dtype=torch.bool))
    preds = FoundPoses(found, scores, boxes[owner], areas[owner], zeros, places)
    return preds, TruePoses(true[owner], areas[owner], [people] + [nobody] * 19)


PARTS: dict[str, Callable[[], Iterator[Case]]] = {
    "suppression": suppression,
    "assignment": assignment,
    "regions": regions,
    "masks": masks,
    "segmentation": segmentation,
    "metrics": metrics,
    "poses": poses,
}
