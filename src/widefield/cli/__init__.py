"""Provide the command line: one module per command, with SUMMARY, ``add(parser)`` and ``run(args)``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import select
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

from widefield._extras import explained
from widefield._keys import KeyParser
from widefield.cli import (
    average,
    bench,
    blocks,
    cam,
    completion,
    demo,
    erf,
    eval,
    export,
    fit,
    interactions,
    kernels,
    keypoint_erf,
    masks,
    models,
    object_erf,
    plan,
    predict,
    recipes,
    report,
    routing,
    runs,
    shape_bias,
    share,
    stability,
    train,
)
from widefield.cli._tables import Printer, add_json

COMMANDS: Mapping[str, ModuleType] = {
    "train": train,
    "fit": fit,
    "demo": demo,
    "recipes": recipes,
    "models": models,
    "plan": plan,
    "eval": eval,
    "predict": predict,
    "share": share,
    "average": average,
    "runs": runs,
    "report": report,
    "erf": erf,
    "object-erf": object_erf,
    "keypoint-erf": keypoint_erf,
    "routing": routing,
    "blocks": blocks,
    "masks": masks,
    "cam": cam,
    "interactions": interactions,
    "shape-bias": shape_bias,
    "stability": stability,
    "kernels": kernels,
    "export": export,
    "bench": bench,
    "completion": completion,
}
"""Commands by name, in the order of the help."""

SEVERAL = ("bench",)
"""Commands with subcommands, each of which has --json."""

USER_ERRORS = (ValueError, TypeError, OSError, FloatingPointError, ModuleNotFoundError)
"""What the library raises for something that the user can fix: shown as one line, without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``widefield`` with the given words (default: those of the process); return the exit status.

    0; 1 after an error in what was asked; 2 after wrong usage (raised as SystemExit by argparse); 3 if ``predict``
    could not read some of the images; 130 or 143 after Ctrl-C or SIGTERM; 141 if the reader of stdout has left.
    """
    parser = _parser()
    if completion.ASKED in os.environ:
        completion.answer(parser)
    words = sys.argv[1:] if argv is None else list(argv)
    args, rest = parser.parse_known_args(words)
    if rest and getattr(args, "recipe", "") is None:  # argparse overlooks it behind options
        args.recipe = rest.pop(0)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.words = words
    command = shlex.join(["widefield", *words])
    args.printer = Printer(as_json=args.json, head={"command": command, "version": _version()})
    try:
        _check_places(args)
        if args.needs_models:
            importlib.import_module("widefield.models")  # registers them in timm; takes seconds
        with args.printer.printing():
            status: int = COMMANDS[args.command].run(args)
        sys.stdout.flush()
    except USER_ERRORS as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return 128 + 13  # SIGPIPE, which Windows does not name
        shown = explained(error) if isinstance(error, ModuleNotFoundError) else error
        print(f"widefield {args.command}: {shown}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status


def _reader_left() -> bool:
    """Return whether nobody reads stdout any more, as after ``| head``; what is still to be written is dropped."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(sys.stdout, 0)
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def _parser() -> argparse.ArgumentParser:
    parser = KeyParser("widefield", description="Receptive fields in convolutional networks.")
    parser.add_argument("--version", action="version", version=f"widefield {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        # allow_abbrev: or a recipe's key that starts like one of our options would be taken for it.
        sub = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY, allow_abbrev=False)
        sub.set_defaults(needs_models=True, writes={})
        module.add(sub)
        if name not in SEVERAL:
            add_json(sub)
    return parser


def _check_places(args: argparse.Namespace) -> None:
    """Raise OSError at once, and not after hours of work, if a place to write to cannot be written.

    ``args.writes`` names the options that hold such places, and says which are folders.
    """
    from widefield._files import check_place

    for option, folder in args.writes.items():
        if (path := getattr(args, option)) is not None:
            check_place(path, folder=folder)


def _version() -> str:
    try:
        return importlib.metadata.version("widefield")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "(not installed)"


if __name__ == "__main__":
    raise SystemExit(main())
