"""``widefield demo``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from widefield.cli.train import described_keys

if TYPE_CHECKING:
    import argparse

    from widefield._keys import KeyParser

SUMMARY = "look at photographs, fit kernel sizes to them, train mixtures, and report, in a few minutes"


def add(parser: KeyParser) -> None:
    """Add the command's arguments."""
    parser.take_keys(described_keys)
    parser.add_argument(
        "--data", nargs="+", default=["photo_crops", "digits"], choices=("photo_crops", "digits", "scales"),
        help="parts: a pretrained network and a fit on photographs, or mixtures on digits or scales "
        "(photo_crops digits)",
    )  # fmt: skip
    parser.add_argument("--output", default="runs/demo", help="folder; an earlier demo in it is replaced (runs/demo)")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield import demo

    page = demo.run(args.data, args.output, args.keys)
    args.printer.add(page=page, **json.loads(page.with_name("results.json").read_text(encoding="utf-8")))
    return 0
