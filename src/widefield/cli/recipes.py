"""``widefield recipes``."""

from __future__ import annotations

import argparse
import fnmatch

SUMMARY = "list the recipes that come with widefield, for train and fit"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("pattern", nargs="?", default="*", help="glob over names, such as 'upernet_*' (all)")
    parser.add_argument("--task", metavar="NAME", help="only those of a task, such as detection")
    parser.set_defaults(needs_models=False)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield import _checks
    from widefield.train import describe_recipes

    every = describe_recipes()
    if args.task is not None:
        _checks.choice("--task", args.task, sorted({recipe.task for recipe in every}))
    found = [
        recipe
        for recipe in every
        if fnmatch.fnmatchcase(recipe.name, args.pattern) and args.task in (None, recipe.task)
    ]
    if not found:
        hint = _checks.did_you_mean(args.pattern, [recipe.name for recipe in every])
        raise ValueError(f"no recipe is called {args.pattern!r}{f' in {args.task}' if args.task else ''}.{hint}")
    args.printer.add(recipes=found)
    args.printer.table(
        [{"recipe": one.name, "task": one.task, "data": one.data, "about": one.about} for one in found], right=()
    )
    return 0
