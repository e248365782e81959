"""``widefield cam``."""

from __future__ import annotations

import argparse
from typing import Any

from widefield.cli import _subjects

SUMMARY = "class activation maps of models, side by side"
METHODS = ("grad_cam", "grad_cam++", "hires_cam", "layer_cam", "eigen_cam", "score_cam")
COUNT = 4
"""Default number of images."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _subjects.arguments(parser, images=COUNT)
    parser.add_argument(
        "--layer", metavar="NAME", help="layer to examine in all models (default: the last one the class depends on)"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="how the layer's map is weighed (grad_cam; hires_cam for key points and boxes)",
    )
    parser.add_argument(
        "--faithfulness",
        action="store_true",
        help="also hide and show the pixels that a map ranks first, and print what becomes of the class's probability",
    )
    _subjects.places(parser, "--target")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.analysis import faithfulness

    analysis = _subjects.analysis(args)
    results: dict[str, Any] = {}
    tests: dict[str, Any] = {}
    for view in _subjects.views(args, analysis):
        chosen = _subjects.target(args, view)
        results[view.name] = analysis.run(view, progress=True, targets=chosen, layer=args.layer, method=args.method)
        if args.faithfulness:
            tests[view.name] = faithfulness(
                view.model, view.images, results[view.name], batch_size=args.batch_size, progress=True
            )
    _subjects.write(results, args, count=args.count)
    if tests:
        _subjects.write(tests, args, "faithfulness")
    return 0
