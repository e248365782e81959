"""Provide data sets: built-in, generated, CIFAR, and files of images with labels, masks, objects or key points."""

from __future__ import annotations

from typing import TYPE_CHECKING

from widefield._lazy import load_on_demand

if TYPE_CHECKING:
    from widefield.data.ade20k import Ade20k
    from widefield.data.base import (
        LabeledImages,
        MultiLabelImages,
        Sample,
        SampleSet,
        check_classes,
        collate,
        seeded,
        summarize,
    )
    from widefield.data.catalog import SETS, create, create_both, options_of
    from widefield.data.cifar import Cifar10, Cifar100
    from widefield.data.cityscapes import Cityscapes
    from widefield.data.coco import Coco, Lvis
    from widefield.data.coco_keypoints import CocoKeypoints
    from widefield.data.coco_labels import CocoLabels
    from widefield.data.coco_stuff import CocoStuff
    from widefield.data.conflict import SIXTEEN, ConflictImages, write_conflicts
    from widefield.data.corrupt import CorruptImagesError
    from widefield.data.decoding import CorruptImageError, LabelError, UnsupportedImageError
    from widefield.data.digits import Digits
    from widefield.data.folder import Folder
    from widefield.data.hugging_face import HuggingFace
    from widefield.data.label_table import LabelTable
    from widefield.data.mask_files import SegmentationFiles
    from widefield.data.masks import Masks
    from widefield.data.object_files import ObjectFiles
    from widefield.data.object_index import AnnotationError
    from widefield.data.objects import DetectionSet, object_palette
    from widefield.data.photo_crops import PhotoCrops
    from widefield.data.photo_files import PHOTOGRAPH_NAMES, Photograph, photographs, write_photographs
    from widefield.data.pictures import PHOTOGRAPHS, Pictures
    from widefield.data.poses import PoseSet
    from widefield.data.scales import Scales
    from widefield.data.scene_labels import SceneLabels
    from widefield.data.scene_poses import ScenePoses
    from widefield.data.scenes import Scenes
    from widefield.data.segmentation import SegmentationSet, default_palette
    from widefield.data.shards import Shards
    from widefield.data.skeleton import Skeleton
    from widefield.data.voc import Voc
    from widefield.data.voc_boxes import VocBoxes
    from widefield.data.yolo import Yolo

load_on_demand(
    __name__,
    {
        "ade20k": "Ade20k",
        "base": "LabeledImages MultiLabelImages Sample SampleSet check_classes collate seeded summarize",
        "catalog": "SETS create create_both options_of",
        "cifar": "Cifar10 Cifar100",
        "cityscapes": "Cityscapes",
        "coco": "Coco Lvis",
        "coco_keypoints": "CocoKeypoints",
        "coco_labels": "CocoLabels",
        "coco_stuff": "CocoStuff",
        "conflict": "SIXTEEN ConflictImages write_conflicts",
        "corrupt": "CorruptImagesError",
        "decoding": "CorruptImageError LabelError UnsupportedImageError",
        "digits": "Digits",
        "folder": "Folder",
        "hugging_face": "HuggingFace",
        "label_table": "LabelTable",
        "mask_files": "SegmentationFiles",
        "masks": "Masks",
        "object_files": "ObjectFiles",
        "object_index": "AnnotationError",
        "objects": "DetectionSet object_palette",
        "photo_crops": "PhotoCrops",
        "photo_files": "PHOTOGRAPH_NAMES Photograph photographs write_photographs",
        "pictures": "PHOTOGRAPHS Pictures",
        "poses": "PoseSet",
        "scales": "Scales",
        "scene_labels": "SceneLabels",
        "scene_poses": "ScenePoses",
        "scenes": "Scenes",
        "segmentation": "SegmentationSet default_palette",
        "shards": "Shards",
        "skeleton": "Skeleton",
        "voc": "Voc",
        "voc_boxes": "VocBoxes",
        "yolo": "Yolo",
    },
)

__all__ = [
    "PHOTOGRAPHS",
    "PHOTOGRAPH_NAMES",
    "SETS",
    "SIXTEEN",
    "Ade20k",
    "AnnotationError",
    "Cifar10",
    "Cifar100",
    "Cityscapes",
    "Coco",
    "CocoKeypoints",
    "CocoLabels",
    "CocoStuff",
    "ConflictImages",
    "CorruptImageError",
    "CorruptImagesError",
    "DetectionSet",
    "Digits",
    "Folder",
    "HuggingFace",
    "LabelError",
    "LabelTable",
    "LabeledImages",
    "Lvis",
    "Masks",
    "MultiLabelImages",
    "ObjectFiles",
    "PhotoCrops",
    "Photograph",
    "Pictures",
    "PoseSet",
    "Sample",
    "SampleSet",
    "Scales",
    "SceneLabels",
    "ScenePoses",
    "Scenes",
    "SegmentationFiles",
    "SegmentationSet",
    "Shards",
    "Skeleton",
    "UnsupportedImageError",
    "Voc",
    "VocBoxes",
    "Yolo",
    "check_classes",
    "collate",
    "create",
    "create_both",
    "default_palette",
    "object_palette",
    "options_of",
    "photographs",
    "seeded",
    "summarize",
    "write_conflicts",
    "write_photographs",
]
