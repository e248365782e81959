"""Provide data sets: built-in (`Digits`), generated (`Scales`), CIFAR, files (`Folder`, `Shards`, `HuggingFace`)."""

from widefield.data.base import LabeledImages, Sample, SampleSet, check_classes, collate, seeded, summarize
from widefield.data.catalog import SETS, create, create_both, options_of
from widefield.data.cifar import Cifar10, Cifar100
from widefield.data.conflict import SIXTEEN, ConflictImages, write_conflicts
from widefield.data.decoding import CorruptImageError, UnsupportedImageError
from widefield.data.digits import Digits
from widefield.data.folder import Folder
from widefield.data.hugging_face import HuggingFace
from widefield.data.image_files import CorruptImagesError
from widefield.data.pictures import PHOTOGRAPHS, Pictures
from widefield.data.scales import Scales
from widefield.data.segmentation import SegmentationSet, default_palette
from widefield.data.shards import Shards

__all__ = [
    "PHOTOGRAPHS",
    "SETS",
    "SIXTEEN",
    "Cifar10",
    "Cifar100",
    "ConflictImages",
    "CorruptImageError",
    "CorruptImagesError",
    "Digits",
    "Folder",
    "HuggingFace",
    "LabeledImages",
    "Pictures",
    "Sample",
    "SampleSet",
    "Scales",
    "SegmentationSet",
    "Shards",
    "UnsupportedImageError",
    "check_classes",
    "collate",
    "create",
    "create_both",
    "default_palette",
    "options_of",
    "seeded",
    "summarize",
    "write_conflicts",
]
