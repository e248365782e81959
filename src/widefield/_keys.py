"""Parse options that are not known in advance, such as ``--optimizer.lr 0.01``, with argparse."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any


class KeyParser(argparse.ArgumentParser):
    """A parser that can take options it does not know as keys; see :meth:`take_keys`."""

    takes_keys = False
    """Whether :meth:`take_keys` was called."""
    _described: Callable[[], str] | None = None

    def take_keys(self, described: Callable[[], str] | None = None) -> None:
        """Take every unknown option of two dashes as a key with one value.

        ``args.keys`` then holds them as ``--KEY=VALUE`` in their order. The parser's own options keep their meaning.

        Args:
            described: returns the text about the keys at the end of the help; called only if that is printed.
        """
        self.takes_keys, self._described = True, described
        self.set_defaults(keys=())

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """Do what argparse does, after adding the options that are not known."""
        words = sys.argv[1:] if args is None else list(args)
        for word in words if self.takes_keys else ():
            option = word.partition("=")[0]
            if option.startswith("--") and option != "--":
                self.add_key(option)
        return super().parse_known_args(words, namespace)

    def add_key(self, option: str, *, shown: bool = False) -> None:
        """Add a key, unless the parser has this option; it is in the list of options if ``shown``."""
        with suppress(argparse.ArgumentError):
            shows = None if shown else argparse.SUPPRESS
            self.add_argument(option, dest="keys", action=_Keep, metavar="VALUE", help=shows)

    def format_help(self) -> str:
        """Return the help, with the text about the keys."""
        text = super().format_help()
        return text if self._described is None else f"{text}\n{self._described()}\n"


class _Keep(argparse.Action):
    """Appends ``--KEY=VALUE``."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.keys = (*namespace.keys, f"{option}={values}")


def keys_of(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return (key, text of the value) for words such as ``["--optimizer.lr", "0.01", "--ema=null"]``.

    Raises ValueError for a key without a value, and for words that belong to no key.
    """
    parser = KeyParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.take_keys()
    try:
        args, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        key = error.argument_name
        raise ValueError(f"{key} needs a value, such as {key} VALUE.") from None
    if rest:
        raise ValueError(f"expected an option such as --optimizer.lr 0.01; got {rest[0]!r}.")
    pairs = (word[2:].partition("=") for word in args.keys)
    return [(key, text) for key, _, text in pairs]
