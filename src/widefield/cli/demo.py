"""``widefield demo``."""

from __future__ import annotations

import argparse

from widefield.cli.train import RecipeHelp

SUMMARY = "train, reparameterize, measure and report, in a few minutes"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.formatter_class = RecipeHelp
    parser.set_defaults(takes_overrides=True)
    parser.add_argument("--data", default="digits", choices=("digits", "scales"), help="what to train on (digits)")
    parser.add_argument("--output", default="runs/demo", help="folder; an earlier demo in it is replaced (runs/demo)")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield import demo

    demo.run(args.data, args.output, args.overrides)
    return 0
