"""What a run knows of its data: ``data.json`` in its folder. With it a run is usable where its data are not."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from widefield import data
from widefield.data.catalog import SETS
from widefield.data.class_map import alike, listed
from widefield.train import checkpoint
from widefield.train.recipe import DataSpec
from widefield.train.recipe_io import DATA_FILE, load_recipe


@dataclass(frozen=True)
class SplitRecord:
    """What a split of a data set held."""

    images: int
    fingerprint: str
    """``ImageSet.fingerprint()``: of names and labels, not of pixels."""


@dataclass(frozen=True)
class RunData:
    """What a run was trained on, and what it expects of images."""

    classes: tuple[str, ...] | None
    """Names of the model's outputs. None: of an older run whose data are not at hand."""
    size: int
    """Side of the images in pixels."""
    mean: tuple[float, ...]
    """Of each channel for pixels in [0, 1]; subtracted from every image."""
    std: tuple[float, ...]
    """Of each channel; every image is divided by it."""
    splits: Mapping[str, SplitRecord] = field(default_factory=dict)
    """Of train and val. Empty for an older run, which has recorded nothing."""

    def check_classes(self, classes: Sequence[str]) -> None:
        """Raise ValueError if the data now have a class that the run does not know, naming what changed."""
        if self.classes is not None and not set(classes) <= set(self.classes):
            changed = "; ".join(_class_changes(self.classes, classes))
            raise ValueError(
                f"the classes of the data have changed since the run: {changed}. "
                f"Give the data their old class names, or use other data or images (--data, --images)."
            )

    def note(self, now: data.ImageSet) -> str:
        """Return how a split differs from what the run was trained or judged on, or an empty string."""
        was = self.splits.get(now.split)
        if was is None:
            return ""
        there = {now.split: SplitRecord(len(now), now.fingerprint())}
        before = replace(self, splits={now.split: was})
        changed = changes(before, replace(self, classes=tuple(now.classes), splits=there))
        return f"changed since the run: {'; '.join(changed)}" if changed else ""


def record(train: data.ImageSet, val: data.ImageSet) -> RunData:
    """Describe the two splits that a run is trained and evaluated on."""
    splits = {part.split: SplitRecord(len(part), part.fingerprint()) for part in (train, val)}
    return RunData(tuple(train.classes), val.image_size, tuple(val.mean), tuple(val.std), splits)


def run_data(run: str | Path) -> RunData:
    """Return class names, image size, normalization and number of images of a run, without opening its data.

    An older run, which has stored none of this, is described by its recipe and, where they are at hand, by its data.

    Args:
        run: the run's folder, ``runs/NAME``.

    Raises:
        FileNotFoundError: it is not the folder of a run.
        ValueError: its ``data.json`` cannot be read.
    """
    found = stored(Path(run).expanduser())
    return _of_recipe(load_recipe(run).data) if found is None else found


def stored(folder: Path) -> RunData | None:
    """Return what a run's folder holds, or None if it is older than ``data.json``; raises ValueError."""
    file = folder / DATA_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        splits = {name: SplitRecord(**split) for name, split in content["splits"].items()}
        mean, std = tuple(content["mean"]), tuple(content["std"])
        return RunData(tuple(content["classes"]), content["size"], mean, std, splits)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not as a run writes it: {type(error).__name__}: {error}.") from error


def store(folder: Path, found: RunData) -> None:
    """Write ``data.json`` into a run's folder; raises OSError."""
    checkpoint.write_text(folder / DATA_FILE, json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n")


def changes(before: RunData, now: RunData) -> list[str]:
    """Return a clause for everything in which the data differ; empty: exactly the same images, names and labels."""
    found = _class_changes(before.classes or (), now.classes or ())
    for name, was in before.splits.items():
        split = now.splits[name]
        if split.images != was.images:
            found.append(f"the {name} split had {was.images} images and has {split.images}")
        elif split.fingerprint != was.fingerprint and not found:
            found.append(f"images of the {name} split have other names or other labels")
    return found


def _class_changes(before: Sequence[str], now: Sequence[str]) -> list[str]:
    gone = [name for name in before if name not in set(now)]
    new = [name for name in now if name not in set(before)]
    if gone and len(gone) == len(new):
        return [f"{_listed(gone)} became {_listed(new)}{alike({*gone, *new}).rstrip('.')}"]
    clauses = [f"{_listed(new)} {'was' if len(new) == 1 else 'were'} added"] if new else []
    clauses += [f"{_listed(gone)} {'is' if len(gone) == 1 else 'are'} gone"] if gone else []
    if not clauses and list(before) != list(now):
        clauses.append("the classes are in another order")
    return clauses


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"class{'es' if len(names) > 1 else ''} {listed(names[:3])}{more}"


def _of_recipe(spec: DataSpec) -> RunData:
    """Describe the data of an older run: by opening them, or by what the recipe says where they are not at hand."""
    try:
        val = data.create(spec.name, "val", **spec.args)
    except (OSError, ImportError):
        made = SETS[spec.name]
        given = {**_defaults(made), **spec.args}
        usual: Any = getattr(made, "statistics", (None, None))
        mean, std = (given[key] or usual[i] for i, key in enumerate(("mean", "std")))
        return RunData(None, given["size"], tuple(mean), tuple(std))
    return RunData(tuple(val.classes), val.image_size, tuple(val.mean), tuple(val.std))


def _defaults(made: type[data.ImageSet]) -> dict[str, Any]:
    """Return the options of a data set that have a default, with it; a class's own go before those of its base."""
    found: dict[str, Any] = {}
    for base in reversed(made.__mro__):
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            found |= {p.name: p.default for p in parameters if p.default is not p.empty}
    return found
