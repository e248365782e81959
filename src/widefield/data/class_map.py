"""Map class names to class indices."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

INTEGER = "integer"
LARGEST_INDEX = 2**31 - 1
"""The largest valid label."""


def classes_of(
    found: Sequence[str], class_map: str | Path | None, images: int = 0
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the names of all classes, by index, and the index of each of the names ``found``.

    Args:
        found: names of classes, such as those of folders, without duplicates.
        class_map: see `indices_of`. Classes that were not found keep their index; a class without a name is named by
            its index.
        images: number of images, for `check_count`.

    Raises:
        OSError: the file cannot be read.
        ValueError: a name is not an index, the file lacks it or repeats a name or an index, or an index is too large.
    """
    known = indices_of(found, class_map)
    if class_map is None:
        return tuple(known), known
    names = {index: name for name, index in reversed(known.items())}
    check_count(max(names), len(names), images, f"the largest index of the class map {str(class_map)!r}")
    return tuple(names.get(index, str(index)) for index in range(max(names) + 1)), known


def indices_of(found: Sequence[str], class_map: str | Path | None) -> dict[str, int]:
    """Return the index of each of the names ``found``, and of all others in the class map.

    Args:
        found: names of classes, such as those of folders, without duplicates.
        class_map: None: the names in sorted order are the classes. ``"integer"``: each name is its index in decimals,
            as in ImageNet-V2 (sorted as words, 10 comes before 2). Otherwise a text file with one class per line:
            ``name``, whose index is the line's, from 0, as in timm's maps; or, on all lines, ``name index``. Names
            match in any Unicode normal form (NFC, NFD).

    Raises:
        OSError: the file cannot be read.
        ValueError: a name is not an index, or the file lacks it or repeats a name or an index.
    """
    if class_map is None:
        return {name: index for index, name in enumerate(sorted(found))}
    if class_map == INTEGER:
        return _integers(found)
    known = read_class_map(class_map)
    forms = Counter(map(_composed, known))
    composed = {_composed(name): index for name, index in known.items() if forms[_composed(name)] == 1}
    known |= {name: composed[_composed(name)] for name in found if name not in known and _composed(name) in composed}
    lacking = sorted(set(found) - set(known))
    if lacking:
        near = any(line.rsplit(maxsplit=1)[0] in lacking for line in known)
        bare = next((line for line in known if not is_index(line.rsplit(maxsplit=1)[-1])), "")
        hint = f" Its line {bare!r} does not end in an index, an integer from 0." if near and bare else ""
        raise ValueError(
            f"the class map {str(class_map)!r} lacks {listed(lacking)}; add them, or remove what they name from the "
            f"data.{hint}"
        )
    return known


def check_count(largest: int, named: int, images: int, what: str) -> None:
    """Raise ValueError for a label that would need far more outputs than there are images.

    At most 1,000 classes, or ten per image, may lack a name.

    Args:
        largest: the largest label.
        named: number of classes with names.
        images: number of images.
        what: name of the label for the message, such as its file.
    """
    if largest + 1 - named > max(1000, 10 * images):
        raise ValueError(
            f"{what} is {largest:,}, which makes {largest + 1:,} classes for {images:,} images. Labels count the "
            f"classes from 0. If it is right, name all classes: in a class map with a name a line, or in a Hugging "
            f"Face data set by a column of type ClassLabel."
        )


def shown(name: str) -> str:
    """Return a name for a message, escaped if it is not in Unicode's normal form NFC but looks like it."""
    return name if _composed(name) == name else ascii(name)


def alike(names: Iterable[str]) -> str:
    """Return a sentence for a message about two names that look the same, or an empty string."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        other = seen.setdefault(_composed(name), name)
        if other != name:
            return (
                f" {other!a} and {name!a} look the same: one has composed characters (Unicode's form NFC), the "
                f"other decomposed ones (NFD, as macOS writes them). Rename one of them."
            )
    return ""


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def read_class_map(path: str | Path) -> dict[str, int]:
    """Read a class map as `indices_of` describes it; raises OSError or ValueError."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"class_map must be 'integer' or a text file with one class name per line; there is no file {str(path)!r}."
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the class map {str(path)!r} is not a text file: {error}.") from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"the class map {str(path)!r} is empty.")
    pairs = [line.rsplit(maxsplit=1) for line in lines]
    if all(len(pair) == 2 and is_index(pair[1]) for pair in pairs):
        entries = [(name, int(index)) for name, index in pairs]
    else:
        entries = [(name, index) for index, name in enumerate(lines)]
    for what, values in (("name", [name for name, _ in entries]), ("index", [index for _, index in entries])):
        repeated = [value for value, count in Counter(values).items() if count > 1]
        if repeated:
            raise ValueError(f"the class map {str(path)!r} has the {what} {listed(repeated)} more than once.")
    return dict(entries)


def _integers(found: Sequence[str]) -> dict[str, int]:
    wrong = [name for name in found if not is_index(name) or str(int(name)) != name]
    if wrong:
        raise ValueError(f"class_map='integer' takes classes named 0, 1, 2 and so on; got {listed(sorted(wrong))}.")
    return {name: int(name) for name in found}


def is_index(word: str) -> bool:
    """Return whether a word is a number that can be a label."""
    return word.isascii() and word.isdecimal() and len(word) < 11 and int(word) <= LARGEST_INDEX


def listed(values: Sequence[object]) -> str:
    """Return the first five values, quoted, and the number of others."""
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    quoted = (repr(v) if not isinstance(v, str) or shown(v) == v else shown(v) for v in values[:5])
    return ", ".join(quoted) + more
