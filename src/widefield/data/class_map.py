"""Which class index a folder's name stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

INTEGER = "integer"


def classes_of(found: Sequence[str], class_map: str | Path | None) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the names of all classes, by index, and the index of each of the names ``found``.

    Args:
        found: names of classes, such as those of folders, without duplicates.
        class_map: None: the names in sorted order are the classes. ``"integer"``: each name is its index, written in
            decimals, as ImageNet-V2 has it (sorted as words, 10 comes before 2). Otherwise a text file with a class a
            line, ``name`` (its index is the line's, from 0, as in timm's maps) or, on all lines, ``name index``;
            classes that were not found keep their index.

    Raises:
        OSError: the file cannot be read.
        ValueError: a name is no index, or the file lacks it, or repeats a name or an index.
    """
    if class_map is None:
        classes = tuple(sorted(found))
        return classes, {name: index for index, name in enumerate(classes)}
    known = _integers(found) if class_map == INTEGER else read_class_map(class_map)
    lacking = sorted(set(found) - set(known))
    if lacking:
        raise ValueError(
            f"the class map {str(class_map)!r} lacks {_listed(lacking)}; add them, or remove what they name from the "
            f"data."
        )
    names = {index: name for name, index in known.items()}
    return tuple(names.get(index, str(index)) for index in range(max(names) + 1)), known


def read_class_map(path: str | Path) -> dict[str, int]:
    """Read a text file as ``classes_of`` describes it; raises OSError or ValueError."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"class_map must be 'integer' or a text file with the name of a class a line; got {str(path)!r}, no file."
        )
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the class map {str(path)!r} is no text: {error}.") from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"the class map {str(path)!r} is empty.")
    pairs = [line.rsplit(maxsplit=1) for line in lines]
    if all(len(pair) == 2 and _is_index(pair[1]) for pair in pairs):
        entries = [(name, int(index)) for name, index in pairs]
    else:
        entries = [(name, index) for index, name in enumerate(lines)]
    for what, values in (("name", [name for name, _ in entries]), ("index", [index for _, index in entries])):
        repeated = [value for value, count in Counter(values).items() if count > 1]
        if repeated:
            raise ValueError(f"the class map {str(path)!r} has the {what} {_listed(repeated)} more than once.")
    return dict(entries)


def _integers(found: Sequence[str]) -> dict[str, int]:
    wrong = [name for name in found if not _is_index(name) or str(int(name)) != name]
    if wrong:
        raise ValueError(f"class_map='integer' takes classes named 0, 1, 2 and so on; got {_listed(sorted(wrong))}.")
    return {name: int(name) for name in found}


def _is_index(word: str) -> bool:
    return word.isascii() and word.isdecimal()


def _listed(values: Sequence[object]) -> str:
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return ", ".join(repr(value) for value in values[:5]) + more
