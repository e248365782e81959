"""Measure Mask R-CNN ResNet-50-FPN here against torchvision's: inference and a training step.

python benchmarks/detection.py [--size 800] [--batch-size 1] [--out benchmarks/results]

- ``inference``: forward under ``torch.inference_mode()``, in evaluation mode.
- ``step``: losses and backward in training mode; no optimizer.

Both have the same network, channels and numbers of proposals, RoIs and detections: 91 outputs there are 90 classes and
the background, and 90 classes here. The first stages of the backbone train in both, and the norms have their own
statistics. Theirs gets images that already have its size and mean, so that it resizes nothing. Its masks are pasted
into the image, ours too (``paste_masks``). Calls are interleaved. Memory is the largest sum of the tensors that a call
allocates, as torch.profiler counts them; oneDNN's own buffers are not in it.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from peers import bars_of, digest_of, peak_bytes, rows_of
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import widefield
from widefield import bench
from widefield.benchmarks import Settings, record
from widefield.benchmarks.record import Record, Row
from widefield.benchmarks.settings import LAYOUTS
from widefield.dense import MaskRCNN, Targets, paste_masks

CLASSES = 90
PEER = "torchvision"
SPREAD = 1.0
"""Deviation of the classifiers' weights, with which enough scores pass the threshold of 0.05 to fill the detections."""
OBJECTS = 8
"""Objects of each image in training, a usual number in COCO."""

COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda r: str(r["model"]),
    "parameters": lambda r: f"{r['parameters'] / 1e6:.2f}M",
    "mode": lambda r: str(r["mode"]),
    "layout": lambda r: str(r["layout"]),
    "ms (p20-p80)": lambda r: record.milliseconds(r["time"]),
    "torchvision, same layout / this": lambda r: f"{r['same_layout']:.2f}",
    "torchvision, better layout / this": lambda r: f"{r['better_layout']:.2f}",
    "peak memory": lambda r: f"{r['peak_bytes'] / 2**20:.0f} MiB",
    "torchvision's memory / this": lambda r: f"{r['memory']:.2f}",
}


def models(size: int, backbone: str, *, limits: dict[str, int]) -> dict[str, nn.Module]:
    """Return name -> model in evaluation mode, theirs first.

    Args:
        size: side of the images.
        backbone: a ResNet of both libraries.
        limits: "proposals" and "detections" of an image.
    """
    torch.manual_seed(0)
    trunk = resnet_fpn_backbone(backbone_name=backbone, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5)
    theirs = TorchvisionMaskRCNN(
        trunk, CLASSES + 1, min_size=size, max_size=size, image_mean=[0.0] * 3, image_std=[1.0] * 3,
        rpn_post_nms_top_n_train=limits["proposals"], rpn_post_nms_top_n_test=limits["proposals"],
        box_detections_per_img=limits["detections"],
    )  # fmt: skip
    ours = MaskRCNN(
        timm.create_model(backbone, features_only=True), CLASSES, train_proposals=limits["proposals"],
        test_proposals=limits["proposals"], max_per_image=limits["detections"],
    )  # fmt: skip
    for predictor in (theirs.roi_heads.box_predictor.cls_score, ours.roi_head.bbox_head.fc_cls):
        nn.init.normal_(predictor.weight, std=SPREAD)
    return {PEER: theirs.eval(), "widefield": ours.eval()}


def objects(batch: int, size: int) -> list[Targets]:
    """Return targets of images of one size: boxes of several sizes, with masks that fill them."""
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(batch):
        side = size * (0.05 + 0.5 * torch.rand(OBJECTS, 2, generator=g))
        corner = (size - side) * torch.rand(OBJECTS, 2, generator=g)
        boxes = torch.cat((corner, corner + side), 1)
        place = torch.arange(size) + 0.5
        x = (place > boxes[:, 0, None]) & (place < boxes[:, 2, None])
        y = (place > boxes[:, 1, None]) & (place < boxes[:, 3, None])
        labels = torch.randint(CLASSES, (OBJECTS,), generator=g)
        found.append(Targets(boxes, labels, y[:, :, None] & x[:, None]))
    return found


def call(name: str, model: nn.Module, x: Tensor, mode: str) -> Callable[[], None]:
    """Return a call of one mode; the model must be in the mode that goes with it."""
    size, targets = x.shape[2], objects(len(x), x.shape[2])
    theirs = [
        {"boxes": t.boxes, "labels": t.labels + 1, "masks": t.masks.to(torch.uint8)}  # type: ignore[union-attr]
        for t in targets
    ]
    images = list(x)

    def infer() -> None:
        with torch.inference_mode():
            found: Any = model(images if name == PEER else x)
            if name != PEER:
                [paste_masks(one.masks, one.boxes, (size, size)) for one in found]

    def step() -> None:
        losses: dict[str, Tensor] = model(images, theirs) if name == PEER else model(x, targets)
        torch.stack(list(losses.values())).sum().backward()
        model.zero_grad(set_to_none=True)

    return step if mode == "step" else infer


def measure(
    settings: Settings, found: dict[str, nn.Module], x: Tensor, mode: str
) -> tuple[dict[str, bench.Row], dict[str, int]]:
    """Return times and peak memory of "MODEL, LAYOUT", for all models and layouts in turns."""
    calls = {}
    for layout, memory_format in LAYOUTS.items():
        for name, model in found.items():
            own = copy.deepcopy(model).to(memory_format=memory_format).train(mode == "step")
            calls[f"{name}, {layout}"] = call(name, own, x.contiguous(memory_format=memory_format), mode)
    return settings.measure(calls), {key: peak_bytes(run) for key, run in calls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--proposals", type=int, default=1000)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for all timings of a call")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    command = shlex.join(["python", "benchmarks/detection.py", *sys.argv[1:]])
    settings = Settings(command, repeats=args.repeats, budget_s=args.budget, out=args.out)
    out = Record("detection", settings)
    out.fact(
        f"Mask R-CNN with {args.backbone} and FPN, {args.size}x{args.size} pixels, batch {args.batch_size}, {CLASSES} "
        f"classes, {args.proposals} proposals, {args.detections} detections, {OBJECTS} objects an image in training; "
        f"torchvision {torchvision.__version__}, widefield {widefield.__version__}."
    )
    table = out.table("Mask R-CNN", COLUMNS)
    x = torch.randn(args.batch_size, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    limits = {"proposals": args.proposals, "detections": args.detections}
    found = models(args.size, args.backbone, limits=limits)
    facts = {name: {"parameters": sum(p.numel() for p in model.parameters())} for name, model in found.items()}
    with out.until_interrupted():
        for mode in ("inference", "step"):
            measured, memory = measure(settings, found, x, mode)
            for row in rows_of(PEER, mode, measured, memory, facts):
                out.add(table, row)
    out.finish(bars_of(table.rows, PEER), digest_of(table.rows, PEER))


if __name__ == "__main__":
    main()
