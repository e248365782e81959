"""The command line: thin commands over the library."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

USER_ERRORS = (ValueError, TypeError, OSError, FloatingPointError)
"""What the library raises for something that the user can mend: shown as one line, without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``widefield`` with the given words (default: those of the process); return the exit status.

    0, 1 after an error in what was asked, 2 after wrong usage (raised as SystemExit by argparse), 130 or 143 after
    Ctrl-C or SIGTERM.
    """
    parser = _parser()
    words = sys.argv[1:] if argv is None else list(argv)
    args, rest = parser.parse_known_args(words)
    args.words = words
    if rest and not args.takes_overrides:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status: int = args.run(args, rest)
    except USER_ERRORS as error:
        print(f"widefield {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("widefield", description="Receptive fields in convolutional networks.")
    parser.add_argument("--version", action="version", version=f"widefield {importlib.metadata.version('widefield')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int], summary: str, *, takes_overrides: bool = False) -> Any:
        # allow_abbrev: or a recipe's key that starts like one of our options would be taken for it.
        sub = commands.add_parser(name, help=summary, formatter_class=_OnDemandHelp, allow_abbrev=False)
        sub.set_defaults(run=run, takes_overrides=takes_overrides)
        return sub

    train = command("train", _train, "train what a recipe describes", takes_overrides=True)
    train.add_argument("recipe", nargs="?", help="a YAML file, or the name of a shipped recipe")
    train.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, exactly")

    demo = command("demo", _demo, "train, re-parameterise, measure and report, in a few minutes", takes_overrides=True)
    demo.add_argument("--data", default="digits", choices=("digits", "scales"), help="what to train on (digits)")
    demo.add_argument("--output", default="runs/demo", help="folder; an earlier demo in it is replaced (runs/demo)")

    models = command("models", _models, "list models with parameters and MACs")
    models.add_argument("pattern", nargs="?", help="glob over all of timm's names; default: those of widefield")
    return parser


class _OnDemandHelp(argparse.RawDescriptionHelpFormatter):
    """Adds the keys of a recipe to the help of the commands that take them, without importing torch before."""

    def format_help(self) -> str:
        text = super().format_help()
        if self._prog.split()[-1] in ("train", "demo"):
            from widefield.train import describe_keys, shipped_recipes

            text += f"\nShipped recipes: {', '.join(shipped_recipes())}.\n\nKeys of a recipe, in YAML and here:\n"
            text += f"{describe_keys()}\n"
        return text


def _train(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from widefield.train import load_recipe, shipped_recipes, train

    if args.recipe and overrides and args.words[1] != args.recipe:
        raise ValueError(f"put the recipe before its keys: widefield train RECIPE {' '.join(overrides)}")
    source = args.recipe or args.resume
    if source is None:
        raise ValueError(f"give a recipe, a YAML file or one of {', '.join(shipped_recipes())}; or --resume RUN.")
    result = train(load_recipe(source, overrides), resume=args.resume)
    return 128 + result.interrupted if result.interrupted else 0


def _demo(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from widefield import demo

    demo.run(args.data, args.output, overrides)
    return 0


def _models(args: argparse.Namespace, _: Sequence[str]) -> int:
    import timm
    import torch
    from rich.console import Console
    from rich.table import Table
    from timm.models import get_pretrained_cfg, is_model_in_modules

    import widefield.models
    from widefield import _checks, bench

    every = timm.list_models()
    if args.pattern is None:
        names = [name for name in every if is_model_in_modules(name, widefield.models.MODULES)]
    else:
        names = [name for name in every if fnmatch.fnmatchcase(name, args.pattern)]
    if not names:
        raise ValueError(f"no model matches {args.pattern!r}.{_checks.did_you_mean(args.pattern, every)}")
    table = Table()
    for column in ("model", "input", "parameters", "MACs"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for name in names:
        config = get_pretrained_cfg(name)
        shape = config.input_size if config else (3, 224, 224)
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except NotImplementedError:  # older releases of timm compute with numbers while they build
            model = timm.create_model(name).to("meta")
        cost = bench.cost(model.eval(), torch.empty(1, *shape, device="meta"))
        table.add_row(name, "x".join(map(str, shape)), f"{cost.parameters / 1e6:.2f}M", f"{cost.macs / 1e9:.3f}G")
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
