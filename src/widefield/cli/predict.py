"""``widefield predict``."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from widefield._files import check_place
from widefield.cli._subjects import MODEL_HELP

if TYPE_CHECKING:
    from widefield.predictions.predict import Written

SUMMARY = "predictions of a model for images: classes of each or of its pixels, objects, poses, or hidden parts"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE",
        help="files, folders, globs; -: paths on standard input, one a line, or one image itself",
    )  # fmt: skip
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
    parser.add_argument("--csv", metavar="FILE", help="a table of classes, objects or key points; -: standard output")
    parser.add_argument("--jsonl", metavar="FILE", help="a line of JSON for each image; -: standard output")
    parser.add_argument("--no-pictures", action="store_true", help="leave out the annotated pictures of each image")
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for page, numbers and pictures (predictions; none with --csv or --jsonl)",
    )  # fmt: skip
    parser.set_defaults(writes={"out": True})


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status: 1 if no image could be read, 3 if some could not."""
    from rich.console import Console

    from widefield._progress import ProgressLine
    from widefield.data.listing import counted
    from widefield.loading import load
    from widefield.predictions.box_files import is_box_file
    from widefield.predictions.image_paths import find_images
    from widefield.predictions.predict import predict_files

    tables = _tables(args)
    folder = args.out or (None if tables else Path("predictions"))
    with tempfile.TemporaryDirectory() as place:
        images = _with_input(args.images, Path(place))
        find_images(images)  # before the model is built
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
                images,
                folder,
                size=args.size,
                top=args.top,
                min_score=args.min_score,
                boxes=boxes,
                box_classes=args.box_classes,
                coco=args.coco,
                batch_size=args.batch_size,
                workers=args.workers,
                pictures=not args.no_pictures,
                progress=lambda found, total: bar.track(found, total=total, description=subject.name),
                **tables,
            )
    if subject.weights.origin == "random":
        print(f"{subject.name} has random weights; --pretrained downloads published ones.", file=sys.stderr)
    found = {"predicted": written.images, "unreadable": written.unreadable}
    if folder is not None:
        found = json.loads((folder / "predict.json").read_text(encoding="utf-8"))
    args.printer.add(**found, files=written.paths)
    if sys.stdout not in tables.values():
        _print(written, args.printer, args.min_score)
    if written.unreadable:
        total = written.images + len(written.unreadable)
        print(f"{len(written.unreadable)} of {counted(total, 'image')} could not be read:", file=sys.stderr)
        for entry in written.unreadable:
            print(f"  {entry.reason}", file=sys.stderr)
    if not written.images:
        return 1
    return SOME_UNREADABLE if written.unreadable else 0


SOME_UNREADABLE = 3
"""Exit status if images could not be read, and others were predicted."""


def _print(written: Written, printer: Any, min_score: float) -> None:
    from widefield.data.listing import counted

    if written.rows:
        printer.table(written.rows, right=["probability", "objects", "poses"])
    if written.images > len(written.rows):
        print(f"and {counted(written.images - len(written.rows), 'more image')}: see the files")
    if written.rows and all(row.get("objects") == "0" for row in written.rows):
        printer.text(f"no object has a score of at least {min_score:g}: --min-score draws and lists others.")
    print("wrote " + ", ".join(map(str, written.paths)))


def _tables(args: argparse.Namespace) -> dict[str, Any]:
    """Return the places of --csv and --jsonl: paths, or standard output; raises ValueError or OSError."""
    given = {name: value for name in ("csv", "jsonl") if (value := getattr(args, name)) is not None}
    if list(given.values()).count("-") == 2:
        raise ValueError("--csv and --jsonl cannot both be standard output: give a file for one of them.")
    if args.json and "-" in given.values():
        raise ValueError("--json and a table cannot both be standard output: give a file for the table.")
    for value in given.values():
        if value != "-":
            check_place(Path(value).expanduser())
    return {name: sys.stdout if value == "-" else Path(value) for name, value in given.items()}


def _with_input(words: list[str], place: Path) -> list[str]:
    """Return the images of the command line, with those of standard input in the place of ``-``.

    Standard input is an image, which is written into ``place``; or paths, one a line, or with zeros between them as
    ``find -print0`` writes. Raises ValueError if it is neither.
    """
    if "-" not in words:
        return words
    content = sys.stdin.buffer.read()
    kind = _image_kind(content)
    if kind is not None:
        path = place / f"stdin.{kind}"
        path.write_bytes(content)
        found = [str(path)]
    else:
        try:
            text = content.decode()
        except UnicodeDecodeError:
            raise ValueError("-: standard input is neither an image that can be read nor paths, one a line.") from None
        lines = text.split("\0") if "\0" in text else text.splitlines()
        found = [line for line in lines if line.strip()]
        if not found:
            raise ValueError("-: standard input is empty: write paths to it, one a line, or an image.")
    return [entry for word in words for entry in (found if word == "-" else [word])]


def _image_kind(content: bytes) -> str | None:
    """Return the format of an image file in lower case, or None for something else."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            return str(image.format).lower()
    except (UnidentifiedImageError, OSError, ValueError):
        return None
