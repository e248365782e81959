"""``widefield masks``."""

from __future__ import annotations

import argparse

from widefield.cli import _subjects

SUMMARY = "GMConv's learned masks, and how far they reach over depth"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser)
    parser.add_argument(
        "--convert", action="store_true", help="put masks on models without any, as training with GMConv starts"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.analysis.masks import masks
    from widefield.nn import DynamicGMConv2d, GMConv2d
    from widefield.surgery import GMConv, convert

    results = {}
    for word in args.models:
        found = _subjects.subject(word, args)
        model, about = found.model, {"weights": str(found.weights)}
        if args.convert and not any(isinstance(m, (GMConv2d, DynamicGMConv2d)) for m in model.modules()):
            model = convert(model, GMConv(), inplace=True)
            about["masks"] = "as training starts"
        images = None
        if any(isinstance(m, DynamicGMConv2d) for m in model.modules()):  # others need none
            pictures = _subjects.pictures(args, found)
            images = (sample["image"] for sample in pictures.batches(args.batch))
            about = {**pictures.about, **about}
        results[found.name] = masks(model, images, name=found.name, about=about, batch=args.batch, progress=True)
    _subjects.write(results, args)
    return 0
