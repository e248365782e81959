"""``widefield train``."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "train the model of a recipe"

_RECORDS = ("config", "failed")
"""Names of the recipe in the folder of a run."""


class RecipeHelp(argparse.RawDescriptionHelpFormatter):
    """Adds the keys of a recipe to a command's help; torch is imported only when the help is printed."""

    def format_help(self) -> str:
        """Return the help with a line per key."""
        from widefield.train import describe_keys, shipped_recipes

        text = super().format_help()
        text += f"\nShipped recipes: {', '.join(shipped_recipes())}.\n\nKeys of a recipe, in YAML and here:\n"
        return f"{text}{describe_keys()}\n"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    # The recipe is read by hand: argparse would take the value of a recipe's key for it.
    parser.usage = "widefield train [-h] [RECIPE] [--resume RUN] [--KEY VALUE ...]"
    parser.epilog = (
        "RECIPE is a YAML file, the folder of a run, or the name of a shipped recipe. A file may inherit from another "
        "one: base: NAME or PATH."
    )
    parser.formatter_class = RecipeHelp
    parser.set_defaults(takes_overrides=True)
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder, exactly")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.train import load_recipe, shipped_recipes, train

    words = args.overrides
    leads = bool(words) and not words[0].startswith("-")
    source, overrides = (words[0], words[1:]) if leads else (args.resume, words)
    if source is None:
        if overrides:
            raise ValueError("put the recipe before its keys: widefield train RECIPE --KEY VALUE, or --resume RUN.")
        raise ValueError(f"give a recipe, a YAML file or one of {', '.join(shipped_recipes())}; or --resume RUN.")
    for word in overrides if args.resume else ():
        if word.partition("=")[0] in ("--name", "--output"):
            raise ValueError(f"a resumed run stays in its folder, {args.resume}: leave out {word.partition('=')[0]}.")
    if source == args.resume and not any((Path(source).expanduser() / f"{kind}.yaml").is_file() for kind in _RECORDS):
        raise FileNotFoundError(f"there is no run in {source}: give the folder of one, such as runs/NAME.")
    result = train(load_recipe(source, overrides), resume=args.resume)
    return 128 + result.interrupted if result.interrupted else 0
