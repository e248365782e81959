"""``widefield completion``, and what it completes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from widefield._keys import KeyParser

SUMMARY = "print the script that completes commands in bash, zsh or fish"

ASKED = "_ARGCOMPLETE"
"""Environment variable that the script sets when it asks for completions."""

_ROOT = Path(__file__).parents[1]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    parser.epilog = (
        'bash: add `eval "$(widefield completion bash)"` to ~/.bashrc. zsh: with zsh, after compinit in ~/.zshrc. '
        "fish: widefield completion fish > ~/.config/fish/completions/widefield.fish."
    )
    parser.set_defaults(needs_models=False)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    try:
        from argcomplete.shell_integration import shellcode
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "completion needs the package argcomplete: pip install argcomplete, where widefield is installed."
        ) from error
    script = shellcode(["widefield"], shell=args.shell)
    args.printer.add(shell=args.shell, script=script)
    print(script)
    return 0


def answer(parser: argparse.ArgumentParser) -> None:
    """Print the completions of the command line that the shell asks about, and end the process."""
    import argcomplete

    _prepare(parser, os.environ.get("COMP_LINE", "").split())
    argcomplete.autocomplete(parser)


def _prepare(parser: argparse.ArgumentParser, line: list[str]) -> None:
    """Give arguments the names that can be found without torch, and the command's parser the keys of recipes."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in action.choices if len(line) > 1 else ():
                if name in line:
                    _prepare(action.choices[name], line)
        elif isinstance(action.metavar, str) and action.metavar in _NAMES:
            action.completer = _completer(_NAMES[action.metavar])  # type: ignore[attr-defined]
    if isinstance(parser, KeyParser) and parser.takes_keys:
        from widefield.train.recipe_io import key_names

        for key in key_names():
            parser.add_key(f"--{key}", shown=True)


def _completer(names: Callable[[], Iterable[str]]) -> Callable[..., list[str]]:
    """Return what argcomplete calls: names, and paths as the shell would complete them."""

    def complete(prefix: str, **_: Any) -> list[str]:
        from argcomplete.completers import FilesCompleter

        found = [name for name in names() if name.startswith(prefix)]
        return found + [path for path in FilesCompleter()(prefix) if path.rstrip(os.sep) not in found]

    return complete


def _recipes() -> Iterable[str]:
    return sorted(path.stem for path in (_ROOT / "train" / "recipes").glob("[!_]*.yaml"))


def _runs() -> Iterable[str]:
    return sorted(str(path.parent) for path in Path("runs").glob("*/config.yaml"))


def _models() -> Iterable[str]:
    """Return our models and the runs; a list of all of timm's would take seconds."""
    import json

    return [*json.loads((_ROOT / "models" / "counts.json").read_text(encoding="utf-8")), *_runs()]


_NAMES: Mapping[str, Callable[[], Iterable[str]]] = {
    "RECIPE": lambda: [*_recipes(), *_runs()],
    "RUN": _runs,
    "MODEL": _models,
}
"""Metavar -> names."""
