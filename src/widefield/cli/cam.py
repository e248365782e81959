"""``widefield cam``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from widefield.cli import _subjects

if TYPE_CHECKING:
    from widefield.runs import Subject

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
            about={**pictures.about, "weights": str(found.weights)},
            progress=True,
        )
    _subjects.write(results, args, count=args.count)
    return 0


def _classes(found: Subject) -> Sequence[str] | None:
    """Return names for the model's scores; of ImageNet's, which are lists of synonyms, the first."""
    names = found.classes if found.trained_on else [name.split(",")[0] for name in found.classes]
    return names or None
