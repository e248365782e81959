"""``widefield predict``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from widefield.cli._subjects import MODEL_HELP

SUMMARY = "predictions of a model for images: classes of each or of its pixels, objects, poses, or hidden parts"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, globs")
    parser.add_argument("--pretrained", action="store_true", help="download pretrained weights (default: random)")
    parser.add_argument("--weights", choices=("ema", "model"), help="weights of a run (the average if it has one)")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a run (best)")
    parser.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="side of the images; other models than classifiers: the shorter side (the model's own); poses: that of "
        "the detector",
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes to list for an image (5)")
    parser.add_argument(
        "--min-score",
        type=float,
        default=0.3,
        metavar="X",
        help="detectors: least score of the objects in pictures and tables; the JSON files hold all. Poses: least "
        "score of the boxes that get a pose (0.3)",
    )
    parser.add_argument(
        "--boxes",
        metavar="SOURCE",
        help="pose models: a detector (as MODEL), or a JSON file: COCO's annotations or results, or predict.json "
        "of a detector (the whole image)",
    )
    parser.add_argument(
        "--box-classes",
        nargs="+",
        metavar="CLASS",
        help="pose models: classes of the boxes that get a pose (those that the model knows)",
    )
    parser.add_argument(
        "--coco",
        type=Path,
        metavar="FILE",
        help="detectors, poses: a COCO file with the ids of images and categories for predict_coco.json (counted "
        "from 1)",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images per batch (8)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="loader processes (0)")
    parser.add_argument("--device", default="cpu", help="where to compute (cpu)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random weights (0)")
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR", help="folder (predictions)")
    parser.set_defaults(writes={"out": True})


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status, 1 if no image could be read."""
    from rich.console import Console

    from widefield._progress import ProgressLine
    from widefield.data.listing import counted
    from widefield.runs import load
    from widefield.runs.box_files import is_box_file
    from widefield.runs.image_paths import find_images
    from widefield.runs.predict import predict_files

    find_images(args.images)  # before the model is built
    subject = load(
        args.model, pretrained=args.pretrained, seed=args.seed, device=args.device, which=args.which,
        weights=args.weights,
    )  # fmt: skip
    boxes = args.boxes
    if boxes is not None and not is_box_file(boxes):
        boxes = load(boxes, pretrained=args.pretrained, seed=args.seed, device=args.device)
    with ProgressLine(Console(stderr=True)) as bar:
        written = predict_files(
            subject,
            args.images,
            args.out,
            size=args.size,
            top=args.top,
            min_score=args.min_score,
            boxes=boxes,
            box_classes=args.box_classes,
            coco=args.coco,
            batch_size=args.batch_size,
            workers=args.workers,
            progress=lambda found, total: bar.track(found, total=total, description=subject.name),
        )
    if subject.weights.origin == "random":
        print(f"{subject.name} has random weights; --pretrained downloads published ones.", file=sys.stderr)
    args.printer.add(**json.loads((args.out / "predict.json").read_text(encoding="utf-8")), files=written.paths)
    if written.rows:
        args.printer.table(written.rows, right=["probability", "objects", "poses"])
    if written.images > len(written.rows):
        print(f"and {counted(written.images - len(written.rows), 'more image')}: see predict.json")
    if written.unreadable:
        print(f"{counted(len(written.unreadable), 'image')} could not be read:", file=sys.stderr)
        for entry in written.unreadable:
            print(f"  {entry.reason}", file=sys.stderr)
    print("wrote " + ", ".join(map(str, written.paths)))
    return 0 if written.images else 1
