"""Provide the base class of analysis results: arrays with facts about their origin, a figure and a table."""

from __future__ import annotations

import dataclasses
import json
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from torch import Tensor

from widefield import _checks, bench, report
from widefield._files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg", ".json", ".html")


class Result(report.Report):
    """A frozen dataclass of arrays (on the CPU) and plain values; each analysis has its subclass.

    Attributes:
        name: the model's name in figures and tables.
        about: how the result came about: number and source of the images, their size, normalization, seed.
    """

    title: ClassVar[str]
    """Heading of a page."""
    lead: ClassVar[str]
    """What the figure shows and how to read it, in one or two sentences."""

    name: str
    about: Mapping[str, Any]

    @abstractmethod
    def rows(self) -> list[dict[str, str]]:
        """Return the table rows as text, with the same columns for every result of a kind."""

    def summary(self) -> str:
        """Return what the result shows, in words, and what was analyzed and how: a line each."""
        words = type(self).reading({self.name: self})
        return "\n".join(filter(None, (words, _described(self.name, self.about))))

    def drawings(self) -> dict[str, Figure]:
        """Return the figures of this result alone, by caption."""
        return self.figures({self.name: self})

    @classmethod
    @abstractmethod
    def draw(cls, results: Mapping[str, Self], *args: Any, **options: Any) -> Figure:
        """Draw one or several results, side by side and on one scale, as a figure that fits a paper's page."""

    @classmethod
    def figures(cls, results: Mapping[str, Self], **options: Any) -> dict[str, Figure]:
        """Return the figures of a page, by caption; by default the one figure of :meth:`draw`."""
        return {cls.lead: cls.draw(results, **options)}

    @classmethod
    @abstractmethod
    def reading(cls, results: Mapping[str, Self]) -> str:
        """Return in words what results show; commands print it, and sections of pages begin with it."""

    def to_dict(self) -> dict[str, Any]:
        """Return all values in JSON's types."""
        return {"kind": type(self).__name__, **plain(self)}

    def plot(self, **options: Any) -> Figure:
        """Return the figure of this result alone; ``options`` are those of :meth:`draw`."""
        return type(self).draw({self.name: self}, **options)

    def save(self, path: str | Path, **options: Any) -> Path:
        """Write a figure (.png, .pdf, .svg), the numbers (.json), or a page with both (.html); return the path."""
        return save({self.name: self}, path, **options)


def save(results: Mapping[str, Result], path: str | Path, **options: Any) -> Path:
    """Write results of one kind, by name, to one file: .png, .pdf, .svg, .json or .html; return its path.

    The file is replaced atomically. ``options`` are those of the results' ``draw``.

    Raises:
        ValueError: another suffix, no results, or results of several kinds.
        OSError: the file cannot be written.
    """
    path = Path(path)
    _checks.choice("the suffix of path", path.suffix, SUFFIXES)
    kinds = {type(result) for result in results.values()}
    if len(kinds) != 1:
        raise ValueError(f"save takes results of one kind; got {sorted(k.__name__ for k in kinds) or 'none'}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        found = {name: result.to_dict() for name, result in results.items()}
        content = (json.dumps({"environment": bench.environment(), "results": found}, allow_nan=False) + "\n").encode()
    elif path.suffix == ".html":
        first, shown = next(iter(results.values())), section(results, **options)
        captions = [part.caption for part in shown.parts if isinstance(part, report.Plot)]
        lead = "" if first.lead in captions else first.lead
        content = report.page(first.title, lead, [shown], bench.environment()).encode()
    else:
        content = report.drawing(kinds.pop().draw(results, **options), path.suffix[1:])
    write_whole(path, content)
    return path


def section(results: Mapping[str, Result], heading: str = "Result", **options: Any) -> report.Section:
    """Return a section: what the results show in words, their figures and tables, and facts about each."""
    kind = type(next(iter(results.values())))
    words = kind.reading(results)
    parts: list[report.Part] = [words] if words else []
    parts += [report.Plot(figure, caption) for caption, figure in kind.figures(results, **options).items()]
    rows = [row for result in results.values() for row in result.rows()]
    if rows:
        parts.append(report.Table(rows, heading))
    facts = [_described(name, result.about) for name, result in results.items()]
    parts += facts if len(facts) == 1 else [report.Fold("How this was measured", facts)]
    return report.Section(heading, parts)


def _described(name: str, about: Mapping[str, Any]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in about.items())
    return f"{name}: {facts}." if facts else f"{name}."


def plain(value: Any) -> Any:
    """Return a value in JSON's types: arrays as nested lists, dataclasses as mappings, NaN as None.

    Raises TypeError for values without such a form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a result must be made of arrays, numbers, strings, lists and mappings; got {value!r}.")
