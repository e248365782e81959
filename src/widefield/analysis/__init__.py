"""Analyze what a model responds to; functions do not change the model, and their results can draw figures."""

from widefield.analysis._detectors import DetectionScore
from widefield.analysis._keypoints import KeypointPeak
from widefield.analysis._objects import ObjectExample, SizeGroup
from widefield.analysis._people import KeypointExample, KeypointGroup
from widefield.analysis._residual import FixedBlock, shut_branches
from widefield.analysis._result import Result, save, section
from widefield.analysis._targets import ClassAt, ClassIn
from widefield.analysis.blocks import BlockContribution, BlockContributions, block_contributions
from widefield.analysis.cam import ClassActivation, class_activation
from widefield.analysis.erf import ReceptiveField, effective_receptive_field
from widefield.analysis.faithfulness import Faithfulness, faithfulness
from widefield.analysis.interactions import Interactions, interactions
from widefield.analysis.kernels import KernelMaps, LayerKernel, kernel_energy
from widefield.analysis.keypoints import KeypointFields, keypoint_receptive_fields
from widefield.analysis.masks import LayerMask, Masks, masks
from widefield.analysis.objects import ObjectFields, object_receptive_fields
from widefield.analysis.routing import Routing, RoutingStatistics, routing_statistics, routing_weights
from widefield.analysis.shape_bias import ShapeBias, shape_bias
from widefield.analysis.stability import TranslationStability, translation_stability
from widefield.analysis.theoretical import Field, theoretical_receptive_field
from widefield.ops.crop_table import CropTable, crop_table

__all__ = [
    "BlockContribution",
    "BlockContributions",
    "ClassActivation",
    "ClassAt",
    "ClassIn",
    "CropTable",
    "DetectionScore",
    "Faithfulness",
    "Field",
    "FixedBlock",
    "Interactions",
    "KernelMaps",
    "KeypointExample",
    "KeypointFields",
    "KeypointGroup",
    "KeypointPeak",
    "LayerKernel",
    "LayerMask",
    "Masks",
    "ObjectExample",
    "ObjectFields",
    "ReceptiveField",
    "Result",
    "Routing",
    "RoutingStatistics",
    "ShapeBias",
    "SizeGroup",
    "TranslationStability",
    "block_contributions",
    "class_activation",
    "crop_table",
    "effective_receptive_field",
    "faithfulness",
    "interactions",
    "kernel_energy",
    "keypoint_receptive_fields",
    "masks",
    "object_receptive_fields",
    "routing_statistics",
    "routing_weights",
    "save",
    "section",
    "shape_bias",
    "shut_branches",
    "theoretical_receptive_field",
    "translation_stability",
]
