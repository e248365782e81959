"""``widefield train``."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from widefield._keys import KeyParser

SUMMARY = "train the model of a recipe"

_RECORDS = ("config", "failed")
"""Names of the recipe in the folder of a run."""


def described_keys() -> str:
    """Return the keys of a recipe as the end of a command's help, as wide as the terminal."""
    from widefield.train import describe_keys

    width = max(40, shutil.get_terminal_size().columns - 2)
    lines = (textwrap.fill(line, width, subsequent_indent=" " * 6) for line in describe_keys().splitlines())
    return "\n".join(["Keys of a recipe, in YAML and here:", *lines])


def add(parser: KeyParser) -> None:
    """Add the command's arguments."""
    parser.usage = (
        "widefield train [-h] [--json] [RECIPE] [--resume RUN] [--KEY VALUE ...]\n"
        "       [--print-config] [--dry-run] [--find-lr] [--find-batch-size]"
    )
    parser.epilog = (
        "RECIPE is a YAML file, the folder of a run, or the name of a shipped recipe, which `widefield recipes` lists. "
        "A file may inherit from another one: base: NAME or PATH."
    )
    parser.take_keys(described_keys)
    parser.set_defaults(needs_models=False)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a file, the folder of a run, or a name")
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder, exactly")
    parser.add_argument(
        "--print-config", action="store_true", help="print the whole recipe as YAML, and do nothing else"
    )
    parser.add_argument(
        "--find-lr",
        action="store_true",
        help="take 100 steps at growing learning rates, print the losses and what rates they suggest; no run is made",
    )
    parser.add_argument(
        "--find-batch-size",
        action="store_true",
        help="print the largest batch size, of powers of two, that fits into the GPU's memory; no run is made",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, read the first batch, and say what would be trained"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from widefield.train import load_recipe, recipe_text

    looks = {"--dry-run": args.dry_run, "--find-lr": args.find_lr, "--find-batch-size": args.find_batch_size}
    for option in (option for option, given in looks.items() if given and args.resume):
        raise ValueError(f"{option} is for new runs: leave out --resume, and give the folder of the run as RECIPE.")
    source = args.recipe or args.resume
    if source is None:
        raise ValueError("give a recipe: a YAML file, or a name that `widefield recipes` lists; or --resume RUN.")
    for word in args.keys if args.resume else ():
        if word.partition("=")[0] in ("--name", "--output"):
            raise ValueError(f"a resumed run stays in its folder, {args.resume}: leave out {word.partition('=')[0]}.")
    if source == args.resume and not any((Path(source).expanduser() / f"{kind}.yaml").is_file() for kind in _RECORDS):
        raise FileNotFoundError(f"there is no run in {source}: give the folder of one, such as runs/NAME.")
    recipe = load_recipe(source, args.keys)
    if args.print_config:
        args.printer.add(recipe=recipe)
        print(recipe_text(recipe), end="")
        return 0
    import widefield.models  # noqa: F401  registers them in timm, after the recipe was found to be right
    from widefield.train import dry_run, find_batch_size, find_learning_rate, train

    if args.dry_run:
        found = dry_run(recipe)
        args.printer.add(dry_run=found)
        print(found)
    if args.find_lr:
        rates = find_learning_rate(recipe)
        args.printer.add(learning_rates=rates.to_dict())
        print(rates.summary())
        args.printer.table(rates.rows())
    if args.find_batch_size:
        size = find_batch_size(recipe)
        args.printer.add(batch_size=size)
        print(f"batch_size: {size}")
    if any(looks.values()):
        return 0
    result = train(recipe, resume=args.resume)
    fields = ("folder", "metrics", "best", "epochs", "steps", "interrupted")
    args.printer.add(**{name: getattr(result, name) for name in fields})
    return 128 + result.interrupted if result.interrupted else 0
