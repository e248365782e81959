"""``widefield shape-bias``."""

from __future__ import annotations

import argparse
from pathlib import Path

from widefield.cli import _subjects

SUMMARY = "shape or texture: which one a model goes by"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=None)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--images", type=Path, metavar="FOLDER", help="a folder a class of shape, with files SHAPEi-TEXTUREj.png"
    )
    source.add_argument(
        "--generate", action="store_true", help="draw images in OUT for models trained on scales: shapes full of shapes"
    )
    parser.add_argument("--per-pair", type=int, default=2, metavar="N", help="images drawn a pair of classes (2)")
    parser.add_argument("--size", type=int, metavar="N", help="side of the images in pixels (the model's own)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images at a time (8)")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.analysis.shape_bias import shape_bias
    from widefield.data import Scales
    from widefield.data.conflict import ConflictImages, write_conflicts
    from widefield.runs.labels import imagenet_names

    results = {}
    for word in args.models:
        found = _subjects.subject(word, args)
        size = args.size or found.size
        if args.generate:
            folder = args.out / f"conflicts-{size}px-{args.per_pair}-a-pair-seed-{args.seed}"
            write_conflicts(folder, size=size, per_pair=args.per_pair, seed=args.seed)
            classes = (found.classes if found.trained_on else ()) or Scales.classes
        else:
            folder = args.images
            classes = found.classes if found.trained_on and found.classes != imagenet_names(1000) else ()
        print(ConflictImages(folder, size=size).found())
        results[found.name] = shape_bias(
            found.model,
            folder,
            size=size,
            mean=found.mean,
            std=found.std,
            classes=classes or None,
            name=found.name,
            about={"weights": str(found.weights)},
            batch=args.batch,
            progress=True,
        )
    _subjects.write(results, args)
    return 0
