"""Create data sets by name, for recipes and the command line."""

from __future__ import annotations

import inspect
from typing import Any

from widefield import _checks
from widefield.data.ade20k import Ade20k
from widefield.data.base import LabeledImages, SampleSet, check_classes
from widefield.data.cifar import Cifar10, Cifar100
from widefield.data.cityscapes import Cityscapes
from widefield.data.class_map import alike, listed
from widefield.data.coco import Coco, Lvis
from widefield.data.coco_keypoints import CocoKeypoints
from widefield.data.coco_stuff import CocoStuff
from widefield.data.digits import Digits
from widefield.data.folder import Folder
from widefield.data.hugging_face import HuggingFace
from widefield.data.masks import Masks
from widefield.data.photo_crops import PhotoCrops
from widefield.data.scales import Scales
from widefield.data.scene_poses import ScenePoses
from widefield.data.scenes import Scenes
from widefield.data.shards import Shards
from widefield.data.voc import Voc
from widefield.data.voc_boxes import VocBoxes
from widefield.data.yolo import Yolo

SETS: dict[str, type[SampleSet]] = {
    "digits": Digits,
    "scales": Scales,
    "scenes": Scenes,
    "photo_crops": PhotoCrops,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "folder": Folder,
    "shards": Shards,
    "hfds": HuggingFace,
    "masks": Masks,
    "ade20k": Ade20k,
    "cityscapes": Cityscapes,
    "voc": Voc,
    "coco_stuff": CocoStuff,
    "coco": Coco,
    "lvis": Lvis,
    "voc_boxes": VocBoxes,
    "yolo": Yolo,
    "coco_keypoints": CocoKeypoints,
    "scene_poses": ScenePoses,
}
"""Name in recipes -> data set. Add your own class to use it in a recipe."""


def create(name: str, split: str, **options: Any) -> SampleSet:
    """Build the data set ``name``.

    Args:
        name: a key of ``SETS``: ``"digits"``, ``"scales"``, ``"scenes"``, ``"photo_crops"``, ``"cifar10"``,
            ``"cifar100"``, ``"folder"``, ``"shards"``, ``"hfds"``, ``"masks"``, ``"ade20k"``, ``"cityscapes"``,
            ``"voc"``, ``"coco_stuff"``, ``"coco"``, ``"lvis"``, ``"voc_boxes"``, ``"yolo"``, ``"coco_keypoints"``,
            ``"scene_poses"`` or one of yours.
        split: ``"train"`` or ``"val"``.
        options: keyword arguments of the set's class: `Digits`, `Scales`, `Scenes`, `PhotoCrops`, `Cifar`, `Folder`,
            `Shards`, `HuggingFace`, `Masks`, `Ade20k`, `Cityscapes`, `Voc`, `CocoStuff`, `Coco`,
            `Lvis`, `VocBoxes`, `Yolo`, `CocoKeypoints`, `ScenePoses`.

    Raises:
        ValueError: unknown name or split, or an option out of range.
        TypeError: unknown or missing option, or one of the wrong type.
        OSError: the files of the set are missing or cannot be read.
        ModuleNotFoundError: the package that reads the set is not installed.
    """
    make = SETS[_checks.choice("name", name, tuple(SETS))]
    accepted = options_of(make)
    for option in options:
        if option not in accepted:
            raise TypeError(
                f"the data set {name!r} has no option {option!r}; it takes {', '.join(accepted)}."
                f"{_checks.did_you_mean(option, accepted)}"
            )
    for option, meaning in make.needs.items():
        if option not in options:
            raise TypeError(f"the data set {name!r} needs the option {option}, {meaning}.")
    return make(split, **options)


def create_both(name: str, **options: Any) -> tuple[SampleSet, SampleSet]:
    """Build the train and the val split of the data set ``name``; see ``create`` for arguments and errors.

    Raises ValueError if a label means different classes in the two, or if labeled images have only one class. Val may
    lack the last classes.
    """
    train, val = create(name, "train", **options), create(name, "val", **options)
    for label, there in enumerate(val.classes):
        here = train.classes[label] if label < len(train.classes) else None
        if here != there:
            raise ValueError(
                f"the splits of {name!r} differ in classes: label {label} is {listed([there])} in val, and in train "
                f"{'there is no such label' if here is None else listed([here])}.{alike({here or there, there})}"
            )
    if isinstance(train, LabeledImages):
        check_classes(train)
    return train, val


def options_of(make: type[SampleSet]) -> list[str]:
    """Return the names of a data set's options, including those that it passes to its base class."""
    names: list[str] = []
    for base in make.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            names += [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return list(dict.fromkeys([*names, *make.further]))  # a class may repeat an option to change its default
