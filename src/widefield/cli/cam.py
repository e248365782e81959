"""``widefield cam``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from widefield.cli import _subjects

if TYPE_CHECKING:
    from widefield.subjects import Subject

SUMMARY = "where models look: class activation maps, side by side"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=4)
    parser.add_argument("--layer", metavar="NAME", help="whose map, in all models (the last that the class depends on)")
    parser.add_argument("--target", type=int, metavar="N", help="number of a class (each image's predicted one)")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.analysis.cam import class_activation

    results = {}
    for word in args.models:
        found = _subjects.subject(word, args)
        pictures = _subjects.pictures(args, found, stand_in=False)
        images = pictures.tensor()
        results[found.name] = class_activation(
            found.model,
            images,
            targets=args.target,
            layer=args.layer,
            classes=_classes(found),
            pixels=pictures.shown(images),
            batch=args.batch,
            name=found.name,
            about={**pictures.about, "weights": found.weights},
            progress=True,
        )
    _subjects.write(results, args, count=args.count)
    return 0


def _classes(found: Subject) -> Sequence[str] | None:
    """Return names for the model's scores: those of a run, ImageNet's for weights from elsewhere, or None."""
    if found.classes:
        return found.classes
    from_elsewhere = found.trained_on is None and found.weights != "random"
    if from_elsewhere and getattr(found.model, "num_classes", 1000) == 1000:
        from timm.data import ImageNetInfo

        return [str(word).split(",")[0] for word in ImageNetInfo().label_descriptions()]
    return None
