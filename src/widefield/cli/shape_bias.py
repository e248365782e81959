"""``widefield shape-bias``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from widefield.cli import _subjects

if TYPE_CHECKING:
    from widefield.loading import Subject

SUMMARY = "whether a model decides by shape or by texture"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=None)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--images", type=Path, metavar="FOLDER", help="a folder per class of shape, with files SHAPEi-TEXTUREj.png"
    )
    source.add_argument(
        "--generate", action="store_true", help="draw images in OUT for models trained on scales: shapes made of shapes"
    )
    parser.add_argument("--per-pair", type=int, default=2, metavar="N", help="images drawn per pair of classes (2)")
    parser.add_argument("--size", type=int, metavar="N", help="side of the images in pixels (the model's own)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (8)")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.analysis._scores import check_scores
    from widefield.data import ConflictImages, Scales, write_conflicts
    from widefield.loading.labels import imagenet_names

    analysis = _subjects.analysis(args)
    results = {}
    for word in args.models:
        found = _subjects.subject(word, args)
        check_scores(found.model)  # before images are drawn
        size = args.size or found.size
        own = found.classes if found.trained_on else ()
        if args.generate:
            _check_shapes(found, own)
            folder = args.out / f"conflicts-{size}px-{args.per_pair}-a-pair-seed-{args.seed}"
            write_conflicts(folder, size=size, per_pair=args.per_pair, seed=args.seed)
            classes = own or Scales.classes
        else:
            folder = args.images
            classes = () if own == imagenet_names(1000) else own
        images = ConflictImages(folder, size=size, mean=found.mean, std=found.std, batch_size=args.batch_size)
        print(images.found())
        view = found.view(images, batch_size=args.batch_size)
        results[view.name] = analysis.run(view, progress=True, classes=classes or None)
    _subjects.write(results, args)
    return 0


def _check_shapes(found: Subject, own: Sequence[str]) -> None:
    """Raise ValueError unless a model can name the shapes that are drawn."""
    from widefield.data import Scales

    count = len(Scales.classes)
    if not set(Scales.classes) <= set(own) if own else found.outputs != count:
        raise ValueError(
            f"--generate draws the {count} shapes of scales ({', '.join(Scales.classes)}), which {found.name} with its "
            f"{found.outputs} outputs does not name: give a run of `widefield train demo_scales`, or --images FOLDER."
        )
