"""Read and write recipes as YAML and from the command line; an unknown key is an error with a suggestion.

jsonargparse decides whether a value has the type of its key. This module adds bases, suggestions for unknown keys, null
only where a key allows it, one-line errors, and a YAML dialect that reads back exactly what it wrote.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import types
import typing
from argparse import SUPPRESS, ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from widefield import _checks
from widefield._extras import need
from widefield._keys import keys_of
from widefield.report import Listing
from widefield.train.recipe import Recipe, TaskSpec

SHIPPED = Path(__file__).with_name("recipes")
BASE = "base"
"""The key of a recipe file that names the recipe to inherit from."""
DATA_FILE = "data.json"
"""A run's record of its data, next to its ``config.yaml``."""


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, merge it into its base if it names one, and apply overrides.

    ``base:`` in a recipe file is the name of a shipped recipe, or a path relative to the file. Bases may have bases.
    Mappings merge key by key; all other values, lists among them, replace those of the base.

    Args:
        path_or_name: a YAML file, the folder of a run (its ``config.yaml``), or the name of a shipped recipe, see
            :func:`shipped_recipes`.
        overrides: command-line words: ``["--optimizer.lr", "0.01", "--model.args.kernel_sizes=[3, 5]"]``. Values are
            YAML. ``--conversion null`` and ``--ema null`` drop the section.

    Raises:
        FileNotFoundError: there is no such file, shipped recipe or base.
        ValueError: not YAML, an unknown or missing key, a value out of range, or bases that form a cycle; the message
            names key and source.
        TypeError: a value of the wrong type; the message names key, type and value.
    """
    content = _content(_find(path_or_name))
    for key, text in keys_of(overrides):
        _override(Recipe, content, key.split("."), text)
    recipe: Recipe = _build(Recipe, content, "")
    return recipe


def parse_recipe(text: str) -> Recipe:
    """Return the recipe of which :func:`recipe_text` made this text; raises ValueError or TypeError for another one."""
    content = read_yaml(text)
    if not isinstance(content, dict):
        raise ValueError(f"a recipe has keys, such as 'name: my_run'; got {content!r}.")
    _check_keys(Recipe, content, "", "in the text")
    recipe: Recipe = _build(Recipe, content, "")
    return recipe


def _content(source: Path, above: Sequence[Path] = ()) -> dict[Any, Any]:
    """Return the keys of a recipe file, merged into those of its ``base``, and so on down the chain."""
    try:
        content = read_yaml(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{source} must hold the keys of a recipe, such as 'name: my_run'; got {content!r}.")
    base = content.pop(BASE, None)
    _check_keys(Recipe, content, "", f"in {source}")
    if base is None:
        return content
    chain = (*above, source.resolve())
    below = _find_base(base, source)
    if below.resolve() in chain:
        names = " -> ".join(path.name for path in (*chain, below))
        raise ValueError(f"{BASE}: {names} is a cycle; remove one of these bases. It stands in {source}.")
    return _merged(_content(below, chain), content)


def _find_base(base: Any, source: Path) -> Path:
    if not isinstance(base, str):
        raise TypeError(f"{BASE} must be the name of a shipped recipe or a path; got {base!r}, in {source}.")
    for path in (source.parent / Path(base).expanduser(), SHIPPED / f"{base}.yaml"):
        if path.is_file():
            return path
    known = [path.stem for path in SHIPPED.glob("*.yaml")]
    raise FileNotFoundError(
        f"{BASE}: {base!r} is neither a file next to {source} nor a shipped recipe.{_checks.did_you_mean(base, known)}"
    )


def _merged(base: Mapping[Any, Any], content: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return ``base`` with the keys of ``content``; mappings merge, all other values replace."""
    both = {
        key: _merged(base[key], value) if isinstance(value, Mapping) and isinstance(base.get(key), Mapping) else value
        for key, value in content.items()
    }
    return {**base, **both}


def read_yaml(text: str) -> Any:
    """Read the YAML dialect of recipes, in which 1e-3 is a number and ``no`` a string; raises ValueError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe with all its keys, so that ``load_recipe(path) == recipe``; raises OSError."""
    Path(path).write_text(recipe_text(recipe), encoding="utf-8")


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe as YAML, with all its keys."""
    return yaml_text(dataclasses.asdict(recipe))


def yaml_text(content: Mapping[str, Any]) -> str:
    """Return a mapping in the YAML dialect of recipes; :func:`read_yaml` reads it back."""
    text: str = yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def read_recipe(content: dict[Any, Any], source: str) -> Recipe:
    """Return the recipe with these keys; raises as :func:`load_recipe` does, naming ``source``."""
    _check_keys(Recipe, content, "", f"in {source}")
    recipe: Recipe = _build(Recipe, content, "")
    return recipe


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with widefield, without the bases, which start with an underscore."""
    return sorted(path.stem for path in SHIPPED.glob("[!_]*.yaml"))


@dataclasses.dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that comes with widefield, in short.

    Attributes:
        name: of the recipe.
        task, data, model: names in it.
        about: the first sentence of its file.
    """

    name: str
    task: str
    data: str
    model: str
    about: str

    def row(self) -> dict[str, str]:
        """Return the fields as a table row."""
        return dataclasses.asdict(self)


def describe_recipes() -> Listing[ShippedRecipe]:
    """Return the recipes that come with widefield, by name."""
    found = Listing[ShippedRecipe]()
    for name in shipped_recipes():
        file = SHIPPED / f"{name}.yaml"
        content = _content(file)
        task = content.get("task", {}).get("name", TaskSpec.name)
        found.append(ShippedRecipe(name, task, content["data"]["name"], content["model"]["name"], _about(file)))
    return found


def _about(file: Path) -> str:
    """Return the first sentence of the comment that a recipe begins with, without its final period."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.lstrip("# ") for line in comment)
    return re.split(r"(?<=[^.]{3})[.:](?= |$)", text, maxsplit=1)[0]


def describe_keys() -> str:
    """Return one line per key of a recipe for the command line: name, type, default, meaning."""
    lines = []
    for leaf in _leaves(Recipe, ""):
        default = leaf.field.default
        if default is dataclasses.MISSING:
            make = leaf.field.default_factory
            default = "required" if make is dataclasses.MISSING else make()
        shown = "null" if default is None else default
        lines.append(f"  --{leaf.key} ({_type_name(leaf.type)}, {shown}): {leaf.help}")
    return "\n".join(lines)


def key_names() -> list[str]:
    """Return the keys of a recipe, with dots, such as ``optimizer.lr``."""
    return [leaf.key for leaf in _leaves(Recipe, "")]


class _Leaf(NamedTuple):
    key: str
    type: Any
    help: str
    field: dataclasses.Field[Any]


_Fast: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The loader in C, where PyYAML was built with it; recipes are read four times as fast."""


class _Loader(_Fast):
    """YAML with 1e-3 as a number and ``no`` as a string; YAML 1.1 reads a string and false."""


class _Dumper(yaml.SafeDumper):
    """Quotes strings that ``_Loader`` or a YAML 1.1 reader would not read as strings."""


_BOOL = "tag:yaml.org,2002:bool"
_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
for _dialect in (_Loader, _Dumper):
    _dialect.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _find(path_or_name: str | Path) -> Path:
    path = Path(path_or_name).expanduser()
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.is_file():
        return path
    if (path / "failed.yaml").is_file():
        raise FileNotFoundError(
            f"the run in {path} failed before its first checkpoint, so it cannot be used or resumed. Start it "
            f"again: widefield train {path / 'failed.yaml'}."
        )
    shipped = SHIPPED / f"{path_or_name}.yaml"
    if path.name == str(path_or_name) and shipped.is_file():
        return shipped
    names = shipped_recipes()
    raise FileNotFoundError(
        f"no recipe {str(path_or_name)!r}: neither a file, nor the folder of a run, nor a shipped recipe."
        f"{_checks.did_you_mean(path.stem, names)} `widefield recipes` lists the shipped ones."
    )


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _section(hint: Any) -> tuple[Any, bool]:
    """Return the dataclass in a type hint, or None, and whether the hint allows None."""
    members = _members(hint)
    section = next((member for member in members if dataclasses.is_dataclass(member)), None)
    return section, type(None) in members


def _entries(hint: Any) -> Any:
    """Return the dataclass of the entries if a type hint is a list of one, or None."""
    inner = typing.get_args(hint)[:1] if typing.get_origin(hint) is list else ()
    return next((entry for entry in inner if dataclasses.is_dataclass(entry)), None)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@cache
def _help(cls: Any) -> dict[str, str]:
    """Return the meaning of each key: the text next to its type."""
    return {name: hint.__metadata__[0] for name, hint in typing.get_type_hints(cls, include_extras=True).items()}


def _leaves(cls: Any, prefix: str) -> Iterator[_Leaf]:
    for item in dataclasses.fields(cls):
        hint = _hints(cls)[item.name]
        section, _ = _section(hint)
        if section:
            yield from _leaves(section, f"{prefix}{item.name}.")
        else:
            yield _Leaf(prefix + item.name, hint, _help(cls)[item.name], item)


def _check_keys(cls: Any, content: dict[Any, Any], prefix: str, source: str) -> None:
    hints = _hints(cls)
    for name, value in content.items():
        if name not in hints:
            raise _unknown(cls, prefix, name, source)
        section, optional = _section(hints[name])
        entries = _entries(hints[name])
        if entries:
            if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
                keys = ", ".join(_hints(entries))
                raise TypeError(f"{prefix}{name} must be a list of mappings ({keys}); got {value!r}, {source}.")
            for number, entry in enumerate(value):
                _check_keys(entries, entry, f"{prefix}{name}[{number}].", source)
        elif section and isinstance(value, dict):
            _check_keys(section, value, f"{prefix}{name}.", source)
        elif section and not (optional and value is None):
            raise TypeError(f"{prefix}{name} must hold keys ({', '.join(_hints(section))}); got {value!r}, {source}.")


def _unknown(cls: Any, prefix: str, name: object, source: str) -> ValueError:
    siblings = list(_hints(cls))
    hint = _checks.did_you_mean(name, siblings)
    if not hint:
        elsewhere = [leaf.key for leaf in _leaves(Recipe, "") if leaf.key.split(".")[-1] == name]
        hint = f" Did you mean {elsewhere[0]!r}?" if elsewhere else f" Known here: {', '.join(siblings)}."
    return ValueError(f"{prefix}{name}: unknown key.{hint} It stands {source}.")


def _override(cls: Any, content: dict[str, Any], names: Sequence[str], text: str, prefix: str = "") -> None:
    """Set one key of a recipe's content, given as its path, from the text of its value.

    ``cls`` defines the known keys; None, inside arguments, allows any key.
    """
    name, *rest = names
    if cls and name not in _hints(cls):
        raise _unknown(cls, prefix, name, "on the command line")
    hint = _hints(cls)[name] if cls else Any
    if not rest:
        content[name] = _value(hint, prefix + name, text)
        if cls:
            _check_keys(cls, {name: content[name]}, prefix, "on the command line")
        return
    section, _ = _section(hint)
    if not section and hint is not Any and typing.get_origin(hint) is not dict:
        raise ValueError(f"--{prefix}{name} is a value and has no keys of its own; got {'.'.join(rest)!r} there.")
    if content.get(name) is None:
        content[name] = {}
    if not isinstance(content[name], dict):
        raise TypeError(
            f"--{prefix}{name} is {content[name]!r} and has no keys of its own; got {'.'.join(rest)!r} there."
        )
    _override(section, content[name], rest, text, f"{prefix}{name}.")


def _value(hint: Any, key: str, text: str) -> Any:
    """Read the text of a value as YAML, or keep it if the key takes a string: ``--name 3`` names a run "3"."""
    textual = str in _members(hint)
    words = (list, type(None), bool) if bool in _members(hint) else (list, type(None))
    try:
        value = read_yaml(text)
    except ValueError as error:
        if textual:  # such as the glob *.conv_dw
            return text
        raise ValueError(f"--{key}: {text!r} is not valid YAML: {error}") from None
    return text if textual and not isinstance(value, words) else value


def _build(cls: Any, content: dict[str, Any], prefix: str) -> Any:
    """Build a dataclass from content whose keys have been checked."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        section, optional = _section(_hints(cls)[item.name])
        entries = _entries(_hints(cls)[item.name])
        if item.name not in content:
            if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                raise ValueError(f"{prefix}{item.name}: missing; it is {_help(cls)[item.name]}.")
        elif entries:
            values[item.name] = [
                _build(entries, entry, f"{prefix}{item.name}[{number}].")
                for number, entry in enumerate(content[item.name])
            ]
        elif section and content[item.name] is not None:
            values[item.name] = _build(section, content[item.name], f"{prefix}{item.name}.")
        else:
            values[item.name] = _typed(prefix + item.name, _hints(cls)[item.name], optional, content[item.name])
    return cls(**values)


@cache
def _parser(hint: Any) -> Any:
    need("jsonargparse")
    from jsonargparse import ArgumentParser  # of the extra [train]; what only lists recipes needs none

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint, default=SUPPRESS)
    return parser


def _typed(key: str, hint: Any, optional: bool, value: Any) -> Any:
    """Return a value in the type of its key, converted if that is lossless; raises TypeError."""
    if (value is None and optional) or typing.get_origin(hint) is dict:
        return value  # jsonargparse would turn strings in a mapping into numbers; the dataclass checks the mapping
    if type(value) is hint or (type(value) in (int, float) and set(_members(hint)) == {type(value), types.NoneType}):
        return value  # jsonargparse returns it as it is, and takes most of the time to read a recipe
    try:
        if value is None:  # jsonargparse accepts null for any type
            raise ArgumentError(None, "null")
        return _parser(hint).parse_object({"value": value})["value"]
    except ArgumentError:
        raise TypeError(f"{key} must be {_type_name(hint)}; got {value!r}.") from None


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is dict:
        return "mapping"
    name = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return re.sub(r"widefield\.train\.recipe\.\w+", "mapping", name.replace("None", "null"))
