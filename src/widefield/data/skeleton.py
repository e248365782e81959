"""Describe the key points of a kind of thing: names, pairs that change places in a mirrored image, sigmas, links."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from widefield import _checks

_SHIPPED = Path(__file__).parent / "skeletons"
_KEYS = ("names", "swap", "sigmas", "links", "upper")

Link = tuple[int, int]
"""The indices of two key points."""


@dataclass(frozen=True)
class Skeleton:
    """The K key points of a kind of thing.

    Args:
        names: of the key points, K different ones.
        swapped: the index that each key point becomes in a mirrored image; left and right change places.
        sigmas: the spread of labels of each key point, in units of the root of the thing's area, as COCO's evaluation
            has them (Ronchi, Perona 2017). The object keypoint similarity falls by half at about 2.4 sigma times that
            root.
        links: pairs of indices, between which figures draw lines.
        upper: indices of the upper body. The others are the lower body. Empty: the thing has no halves, and
            training never shows one alone.

    Raises:
        ValueError: the parts do not fit together; the message names the key point.
    """

    names: tuple[str, ...]
    swapped: tuple[int, ...]
    sigmas: tuple[float, ...]
    links: tuple[Link, ...] = ()
    upper: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.names)
        if not count:
            raise ValueError("a skeleton needs at least one key point; names is empty.")
        if repeated := {name for name in self.names if self.names.count(name) > 1}:
            raise ValueError(f"the names of key points must differ; {min(repeated)!r} is there twice.")
        for part, values in (("swapped", self.swapped), ("sigmas", self.sigmas)):
            if len(values) != count:
                raise ValueError(f"{part} must have one entry per key point, {count}; it has {len(values)}.")
        for part, indices in (("swapped", self.swapped), ("links", sum(self.links, ())), ("upper", self.upper)):
            for index in indices:
                _checks.integer(f"an index in {part}", index, minimum=0, maximum=count - 1)
        self._refuse_repeated("upper", [(index,) for index in self.upper])
        self._refuse_repeated("links", [tuple(sorted(link)) for link in self.links])
        for index, other in enumerate(self.swapped):
            if self.swapped[other] != index:
                raise ValueError(
                    f"swapped must be pairs: {self.names[index]!r} becomes {self.names[other]!r}, which becomes "
                    f"{self.names[self.swapped[other]]!r}."
                )
        for name, sigma in zip(self.names, self.sigmas, strict=True):
            if not (0 < sigma < math.inf):
                raise ValueError(f"the sigma of {name!r} must be a number above 0; got {sigma!r}.")

    def _refuse_repeated(self, part: str, entries: Sequence[tuple[int, ...]]) -> None:
        for place, entry in enumerate(entries):
            if entry in entries[:place]:
                names = " - ".join(repr(self.names[index]) for index in entry)
                raise ValueError(f"{part} has {names} twice. Leave one out.")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def lower(self) -> tuple[int, ...]:
        """Return the indices of the lower body: all that are not in ``upper``; empty if the thing has no halves."""
        return tuple(index for index in range(len(self)) if index not in self.upper) if self.upper else ()

    @classmethod
    def load(cls, source: str | Path | Skeleton) -> Skeleton:
        """Return a skeleton that comes with this library, or that of a YAML file.

        The file refers to key points by their names:

        - ``names``: a list;
        - ``swap``: pairs of names that change places in a mirrored image;
        - ``sigmas``: a number for each name, as a mapping or in the order of ``names``, or one number for all. Without
          it they are 1 / K, as in Ultralytics' packages, which is lenient for few key points;
        - ``links``: pairs of names;
        - ``upper``: names of the upper body.

        All but ``names`` may be left out.

        Args:
            source: ``"coco"``, ``"scenes"``, or the path of a YAML file. A skeleton is returned as it is.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not of this form; the message names the file and the part.
            TypeError: the source is not a name or path.
        """
        if isinstance(source, Skeleton):
            return source
        if not isinstance(source, (str, Path)):
            raise TypeError(f"skeleton must be a name or the path of a YAML file; got {source!r}.")
        shipped = {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}
        path = shipped.get(str(source)) or Path(source).expanduser()
        if not path.is_file():
            near = _checks.did_you_mean(source, shipped)
            raise FileNotFoundError(
                f"there is no skeleton {str(source)!r}: it is neither {' nor '.join(map(repr, shipped))}, nor a file."
                f"{near}"
            )
        try:
            return _described(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (yaml.YAMLError, ValueError, TypeError) as error:  # UnicodeDecodeError is a ValueError
            raise ValueError(f"the skeleton {path} is not valid: {' '.join(str(error).split())}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the parts as lists, for JSON; `from_dict` takes them."""
        return {name: _lists(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, parts: Mapping[str, Any]) -> Skeleton:
        """Return the skeleton of `to_dict`'s parts; raises TypeError or ValueError for others."""
        return cls(
            names=tuple(parts["names"]),
            swapped=tuple(parts["swapped"]),
            sigmas=tuple(parts["sigmas"]),
            links=tuple((first, second) for first, second in parts["links"]),
            upper=tuple(parts["upper"]),
        )


def _lists(value: Any) -> Any:
    return [_lists(one) for one in value] if isinstance(value, tuple) else value


def _described(content: Any) -> Skeleton:
    """Return the skeleton that the content of a YAML file describes; raises ValueError or TypeError."""
    if not isinstance(content, Mapping):
        raise TypeError(f"it must be a mapping with the keys {', '.join(_KEYS)}; got {_short(content)}.")
    for key in content:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key!r}; known are {', '.join(_KEYS)}.{_checks.did_you_mean(key, _KEYS)}")
    names = content.get("names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"names must be a list of texts, such as [nose, left_eye, right_eye]; got {_short(names)}.")
    swapped = list(range(len(names)))
    for first, second in _pairs("swap", content.get("swap"), names):
        for index in (first, second):
            if swapped[index] != index:
                raise ValueError(f"swap has {names[index]!r} in two pairs; each key point changes places with one.")
        swapped[first], swapped[second] = second, first
    return Skeleton(
        tuple(names),
        tuple(swapped),
        _sigmas(content.get("sigmas"), names),
        tuple(_pairs("links", content.get("links"), names)),
        tuple(_place("upper", name, names) for name in _list("upper", content.get("upper"))),
    )


def _sigmas(values: Any, names: Sequence[str]) -> tuple[float, ...]:
    if values is None:
        return (1 / len(names),) * len(names)
    if isinstance(values, list):
        if len(values) != len(names):
            raise ValueError(f"sigmas must have one entry per key point, {len(names)}; it has {len(values)}.")
        pairs = zip(names, values, strict=True)
        return tuple(_checks.number(f"the sigma of {name!r}", value) for name, value in pairs)
    if not isinstance(values, Mapping):
        return (_checks.number("sigmas", values),) * len(names)
    found = {_place("sigmas", name, names): _checks.number(f"the sigma of {name!r}", values[name]) for name in values}
    for index, name in enumerate(names):
        if index not in found:
            raise ValueError(f"sigmas has no entry for {name!r}; give one for every key point, or one number for all.")
    return tuple(found[index] for index in range(len(names)))


def _pairs(part: str, values: Any, names: Sequence[str]) -> list[Link]:
    """Return pairs of names as pairs of different indices."""
    found = []
    for pair in _list(part, values):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{part} must be pairs of names, such as [left_eye, right_eye]; got {_short(pair)}.")
        first, second = (_place(part, name, names) for name in pair)
        if first == second:
            raise ValueError(f"{part} must be pairs of different key points; got {pair!r}.")
        found.append((first, second))
    return found


def _list(part: str, values: Any) -> list[Any]:
    if values is None:
        return []
    if not isinstance(values, list):
        raise TypeError(f"{part} must be a list; got {_short(values)}.")
    return values


def _place(part: str, name: Any, names: Sequence[str]) -> int:
    if not isinstance(name, str) or name not in names:
        near = _checks.did_you_mean(name, names)
        raise ValueError(f"{part} has {_short(name)}, which is not in names.{near}")
    return names.index(name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
