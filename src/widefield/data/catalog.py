"""Create data sets by name, for recipes and the command line."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from widefield import _checks
from widefield._lazy import Registry
from widefield.data._stores import is_url
from widefield.data.class_map import alike, listed

if TYPE_CHECKING:
    from widefield.data.base import SampleSet

SETS: Registry[type[SampleSet]] = Registry(
    {
        "digits": "widefield.data.digits:Digits",
        "scales": "widefield.data.scales:Scales",
        "scenes": "widefield.data.scenes:Scenes",
        "photo_crops": "widefield.data.photo_crops:PhotoCrops",
        "cifar10": "widefield.data.cifar:Cifar10",
        "cifar100": "widefield.data.cifar:Cifar100",
        "folder": "widefield.data.folder:Folder",
        "shards": "widefield.data.shards:Shards",
        "hfds": "widefield.data.hugging_face:HuggingFace",
        "masks": "widefield.data.masks:Masks",
        "ade20k": "widefield.data.ade20k:Ade20k",
        "cityscapes": "widefield.data.cityscapes:Cityscapes",
        "voc": "widefield.data.voc:Voc",
        "coco_stuff": "widefield.data.coco_stuff:CocoStuff",
        "coco": "widefield.data.coco:Coco",
        "lvis": "widefield.data.coco:Lvis",
        "voc_boxes": "widefield.data.voc_boxes:VocBoxes",
        "yolo": "widefield.data.yolo:Yolo",
        "coco_keypoints": "widefield.data.coco_keypoints:CocoKeypoints",
        "scene_poses": "widefield.data.scene_poses:ScenePoses",
        "label_table": "widefield.data.label_table:LabelTable",
        "coco_labels": "widefield.data.coco_labels:CocoLabels",
        "scene_labels": "widefield.data.scene_labels:SceneLabels",
    }
)
"""Name in recipes -> data set. Add your own class to use it in a recipe."""


def create(name: str, split: str, **options: Any) -> SampleSet:
    """Build the data set ``name``.

    Args:
        name: a key of ``SETS``: ``"digits"``, ``"scales"``, ``"scenes"``, ``"photo_crops"``, ``"cifar10"``,
            ``"cifar100"``, ``"folder"``, ``"shards"``, ``"hfds"``, ``"masks"``, ``"ade20k"``, ``"cityscapes"``,
            ``"voc"``, ``"coco_stuff"``, ``"coco"``, ``"lvis"``, ``"voc_boxes"``, ``"yolo"``, ``"coco_keypoints"``,
            ``"scene_poses"``, ``"label_table"``, ``"coco_labels"``, ``"scene_labels"`` or one of yours.
        split: ``"train"`` or ``"val"``.
        options: keyword arguments of the set's class: `Digits`, `Scales`, `Scenes`, `PhotoCrops`, `Cifar`, `Folder`,
            `Shards`, `HuggingFace`, `Masks`, `Ade20k`, `Cityscapes`, `Voc`, `CocoStuff`, `Coco`,
            `Lvis`, `VocBoxes`, `Yolo`, `CocoKeypoints`, `ScenePoses`, `LabelTable`, `CocoLabels`, `SceneLabels`.

    Raises:
        ValueError: unknown name or split, an option out of range, or a URL as the root of a set that reads files of
            this machine only.
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
    if is_url(options.get("root")) and not make.reads_urls:
        raise ValueError(
            f"the data set {name!r} reads files of this machine only; got root={options['root']!r}. Download them; the "
            f"sets folder and shards read URLs."
        )
    return make(split, **options)


def create_both(name: str, **options: Any) -> tuple[SampleSet, SampleSet]:
    """Build the train and the val split of the data set ``name``; see ``create`` for arguments and errors.

    Raises ValueError if a label means different classes in the two, or if labeled images have only one class. Val may
    lack the last classes.
    """
    from widefield.data.base import LabeledImages, check_classes

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
