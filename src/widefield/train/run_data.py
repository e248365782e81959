"""Record a run's data in ``data.json`` in its folder, so that the run is usable where its data are missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from widefield import data
from widefield.data.class_map import alike, listed
from widefield.data.crops import PADDING
from widefield.data.poses import PoseSet
from widefield.data.skeleton import Skeleton
from widefield.train import checkpoint
from widefield.train.recipe_io import DATA_FILE


@dataclass(frozen=True)
class SplitRecord:
    """The samples of one split."""

    images: int
    fingerprint: str
    """``SampleSet.fingerprint()``: of names and labels, not of pixels."""


@dataclass(frozen=True)
class RunData:
    """What a run was trained on, and how its model expects images."""

    classes: tuple[str, ...]
    """Names of the classes; empty if the data have none."""
    size: int | None
    """Side of the images in pixels; None if they differ."""
    mean: tuple[float, ...]
    """Of each channel for pixels in [0, 1]; subtracted from every image."""
    std: tuple[float, ...]
    """Of each channel; every image is divided by it."""
    splits: Mapping[str, SplitRecord]
    """Of train and val."""
    palette: tuple[tuple[int, int, int], ...] = ()
    """Of a set for segmentation or detection: color of each class, (red, green, blue)."""
    crop_size: tuple[int, int] | None = None
    """Of a segmentation set: (height, width) of the train images in pixels; None if they differ. Of a pose set: that of
    all crops."""
    test_scale: tuple[int, int] | None = None
    """Of a set for segmentation or detection: (longer side, shorter side) of the rectangle that val images are fitted
    into; None: their size is kept."""
    object_classes: tuple[str, ...] = ()
    """Of a set with objects: names of their classes, without a background."""
    skeleton: Skeleton | None = None
    """Of a pose set: the key points."""
    udp: bool = False
    """Of a pose set: whether crops are cut with ``udp``."""
    padding: float = PADDING
    """Of a pose set: sides of the crops relative to the boxes."""

    def check_classes(self, classes: Sequence[str]) -> None:
        """Raise ValueError naming the changes if the data have a class that the run does not know."""
        if not set(classes) <= set(self.classes):
            changed = "; ".join(_class_changes(self.classes, classes))
            raise ValueError(
                f"the classes of the data have changed since the run: {changed}. "
                f"Give the data their old class names, or use other data or images (--data, --images)."
            )

    def note(self, now: data.SampleSet) -> str:
        """Return how a split differs from the one that the run was trained or evaluated on, or an empty string."""
        was = self.splits[now.split]
        there = {now.split: SplitRecord(len(now), now.fingerprint())}
        before = replace(self, splits={now.split: was})
        changed = changes(before, replace(self, classes=tuple(now.classes), splits=there))
        return f"changed since the run: {'; '.join(changed)}" if changed else ""


def record(train: data.SampleSet, val: data.SampleSet) -> RunData:
    """Describe the two splits that a run is trained and evaluated on."""
    splits = {part.split: SplitRecord(len(part), part.fingerprint()) for part in (train, val)}
    found = RunData(tuple(train.classes), val.image_size, tuple(val.mean), tuple(val.std), splits)
    if isinstance(train, PoseSet):
        return replace(found, skeleton=train.skeleton, crop_size=train.crop_size, udp=train.udp, padding=train.padding)
    if not isinstance(train, (data.SegmentationSet, data.DetectionSet)):
        return found
    return replace(
        found,
        palette=train.palette,
        crop_size=getattr(train, "crop_size", None),
        test_scale=train.test_scale,
        object_classes=tuple(getattr(train, "object_classes", ())),
    )


def read(folder: Path) -> RunData:
    """Return the record in a run's folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read.
    """
    file = folder / DATA_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is not the folder of a run: it has no {DATA_FILE}, the record of the run's data."
        )
    try:
        return parse(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not as a run writes it: {type(error).__name__}: {error}.") from error


def parse(content: Mapping[str, Any]) -> RunData:
    """Return the record that ``dataclasses.asdict`` made a mapping of; lists may take the place of tuples.

    Raises ValueError, TypeError, KeyError or AttributeError for another mapping.
    """
    splits = {name: SplitRecord(**split) for name, split in content["splits"].items()}
    classes, mean, std = (tuple(content[key]) for key in ("classes", "mean", "std"))
    found = RunData(classes, content["size"], mean, std, splits)
    crop, scale = (tuple(content[key]) if content.get(key) else None for key in ("crop_size", "test_scale"))
    palette = tuple((red, green, blue) for red, green, blue in content.get("palette", ()))
    objects = tuple(content.get("object_classes", ()))
    skeleton = Skeleton.from_dict(content["skeleton"]) if content.get("skeleton") else None
    return replace(
        found,
        palette=palette,
        crop_size=crop,
        test_scale=scale,
        object_classes=objects,
        skeleton=skeleton,
        udp=content.get("udp", False),
        padding=content.get("padding", PADDING),
    )


def store(folder: Path, found: RunData) -> None:
    """Write ``data.json`` into a run's folder; raises OSError."""
    checkpoint.write_text(folder / DATA_FILE, json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n")


def changes(before: RunData, now: RunData) -> list[str]:
    """Return one clause for each difference between data; empty if images, names and labels are the same."""
    samples = "images" if before.skeleton is None else "crops"
    found = _class_changes(before.classes, now.classes)
    for name, was in before.splits.items():
        split = now.splits[name]
        if split.images != was.images:
            found.append(f"the {name} split had {was.images} {samples} and has {split.images}")
        elif split.fingerprint != was.fingerprint and not found:
            found.append(f"{samples} of the {name} split have other names or other labels")
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
