"""Load public names at their first use, so that lists of runs and recipes need no torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from types import ModuleType
from typing import Any, TypeVar

from widefield._extras import explained

Value = TypeVar("Value")


def load_on_demand(package: str, modules: Mapping[str, str]) -> None:
    """Give a package the public names of its modules, which are imported when a name is first used.

    The package repeats these names as imports under ``if TYPE_CHECKING``, for type checkers and the documentation.

    Args:
        package: its name, ``__name__`` in its ``__init__.py``.
        modules: name of a module in the package -> its public names, separated by spaces.
    """
    module = sys.modules[package]
    module.__class__ = _Package
    module._homes = {name: home for home, names in modules.items() for name in names.split()}  # type: ignore[attr-defined]


class _Package(ModuleType):
    """A package whose names live in modules that are imported when needed."""

    _homes: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        home = self._homes.get(name)
        if home is not None:
            try:
                value = getattr(importlib.import_module(f"{self.__name__}.{home}"), name)
            except ModuleNotFoundError as error:
                raise explained(error) from error
            setattr(self, name, value)
            return value
        # An eager package would have imported its modules.
        if not name.startswith("__") and importlib.util.find_spec(f"{self.__name__}.{name}") is not None:
            return importlib.import_module(f"{self.__name__}.{name}")
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # Python stores each imported module in its package. A function of the same name, as predictions.predict, stays.
        if isinstance(value, ModuleType) and name in self._homes:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._homes})


class Registry(MutableMapping[str, Value]):
    """A dictionary whose values may be given as text, ``"module:name"``, and are imported at their first use."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        self._entries: dict[str, str | Value] = dict(entries)

    def __getitem__(self, key: str) -> Value:
        entry = self._entries[key]
        if isinstance(entry, str):
            module, _, name = entry.partition(":")
            entry = self._entries[key] = getattr(importlib.import_module(module), name)
        return entry

    def __setitem__(self, key: str, value: Value) -> None:
        self._entries[key] = value

    def __delitem__(self, key: str) -> None:
        del self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self)})"
