"""List the analyses by name, with their calls in commands and reports and their requirements on model and images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from widefield.analysis._detectors import is_detector
from widefield.analysis._keypoints import is_pose_model
from widefield.analysis._result import Result
from widefield.analysis._scores import gives_scores
from widefield.analysis.blocks import block_contributions
from widefield.analysis.cam import class_activation
from widefield.analysis.erf import effective_receptive_field
from widefield.analysis.interactions import interactions
from widefield.analysis.kernels import kernel_energy
from widefield.analysis.keypoints import keypoint_receptive_fields
from widefield.analysis.masks import masks
from widefield.analysis.objects import object_receptive_fields
from widefield.analysis.routing import mixtures, routing_statistics
from widefield.analysis.shape_bias import shape_bias
from widefield.analysis.stability import translation_stability, usual_shifts
from widefield.data import ConflictImages, Pictures, SampleSet
from widefield.nn import DynamicGMConv2d, GMConv2d


@dataclass(frozen=True)
class View:
    """A model, the images it is shown, and what is known of both."""

    model: nn.Module
    name: str
    """The model's name in tables and figures."""
    weights: str
    """Where the model's weights come from."""
    pictures: Pictures | ConflictImages | None = None
    """The images; None for analyses that read only weights."""
    classes: tuple[str, ...] = ()
    """Names of the model's outputs; empty if unknown."""
    labels: str = ""
    """Key of the images' labels, if those are of the model's own classes: "label", "mask" or "keypoints"."""
    batch_size: int = 8
    samples: SampleSet | None = None
    """Samples with objects, for analyses that read those."""
    source: str = ""
    """Name of the samples' data set."""

    @property
    def about(self) -> dict[str, Any]:
        """Facts that a result keeps about its model and images."""
        if self.samples is not None:
            return {"source": self.source, "weights": self.weights}
        return {**(self.pictures.about if isinstance(self.pictures, Pictures) else {}), "weights": self.weights}

    @property
    def shown(self) -> Pictures:
        """The images; raises TypeError if there are none, or they are not `Pictures`."""
        if not isinstance(self.pictures, Pictures):
            raise TypeError(f"this analysis looks at pictures; got {type(self.pictures).__name__}.")
        return self.pictures

    @cached_property
    def images(self) -> Tensor:
        """All images as one tensor (N, C, H, W)."""
        return self.shown.tensor()

    @property
    def own(self) -> bool:
        """Whether each image has a label, which is an index of the model's outputs."""
        return self.labels == "label"

    def batches(self) -> Iterable[Any]:
        """Return the images in batches, with their labels."""
        return self.shown.batches(self.batch_size)

    def labeled_batches(self) -> list[tuple[Tensor, ...]]:
        """Return the images in batches, (images, labels) if the labels are of the model's own classes, or (images,)."""
        key = self.labels
        return [(batch["image"], batch[key]) if key in batch else (batch["image"],) for batch in self.batches()]


def _always(model: nn.Module) -> bool:
    return True


def _nothing(view: View) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Analysis:
    """One analysis: its function, and how a command or a report calls it."""

    name: str
    """Name of its command and of the command's files."""
    function: Callable[..., Result]
    """(model, images, *, ...) -> a result, which draws itself."""
    heading: str
    """Heading of its section in a report."""
    images: Callable[[View], Any] = View.batches
    """The images as the function takes them."""
    reads_images: Callable[[nn.Module], bool] = _always
    """Whether the analysis of this model needs images, or only its weights."""
    reads_objects: bool = False
    """Whether it reads a run's own samples, with boxes and labels of objects, instead of pictures."""
    arguments: Callable[[View], dict[str, Any]] = _nothing
    """Further arguments that follow from the model and its images."""
    applies: Callable[[nn.Module], bool] = _always
    """Whether a model has what the analysis measures."""
    needs: str = ""
    """The kind of model to which it applies, if it reads objects."""
    stand_in: bool = True
    """Whether photographs may stand in for missing images of a run."""
    reported: Callable[[int], int] | None = None
    """Report's number of images -> number that this analysis uses; None: not part of reports."""
    report_options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the function in a report."""
    margin: Callable[[Mapping[str, Any], int], int] = lambda options, side: 0
    """By how many pixels images exceed the model's own side, given the function's options and that side."""

    def run(self, view: View, *, progress: bool = False, **options: Any) -> Result:
        """Run the analysis on a view; ``options`` are keyword arguments of its function."""
        given = {"name": view.name, "about": view.about, **self.arguments(view), **options}
        if self.reads_objects:
            return self.function(view.model, view.samples, progress=progress, **given)
        if view.pictures is None:
            return self.function(view.model, **given)
        return self.function(view.model, self.images(view), batch_size=view.batch_size, progress=progress, **given)


def _for_maps(view: View) -> dict[str, Any]:
    return {"classes": view.classes or None, "pixels": view.shown.shown(view.images)}


def _for_routing(view: View) -> dict[str, Any]:
    pictures = view.shown
    return {"classes": pictures.classes or None, "names": [pictures.name(i) for i in range(len(pictures))]}


def _for_interactions(view: View) -> dict[str, Any]:
    pictures = view.shown
    labels = [pictures.sample(index)["label"] for index in range(len(pictures))] if view.own else None
    return {"targets": labels}


def _masked(model: nn.Module) -> bool:
    return any(isinstance(module, (GMConv2d, DynamicGMConv2d)) for module in model.modules())


def _masked_by_image(model: nn.Module) -> bool:
    return any(isinstance(module, DynamicGMConv2d) for module in model.modules())


ANALYSES: Mapping[str, Analysis] = MappingProxyType(
    {
        analysis.name: analysis
        for analysis in (
            Analysis(
                "erf",
                effective_receptive_field,
                "Effective receptive field",
                arguments=lambda view: {"classes": view.classes or None},
                reported=lambda count: count,
            ),
            Analysis(
                "object-erf",
                object_receptive_fields,
                "Effective receptive fields of objects",
                reads_objects=True,
                arguments=lambda view: {"classes": view.classes or None},
                applies=is_detector,
                needs="a detector of widefield.dense",
                reported=lambda count: 2 * count,
                report_options={"count": 12},
            ),
            Analysis(
                "keypoint-erf",
                keypoint_receptive_fields,
                "Effective receptive fields of key points",
                reads_objects=True,
                arguments=lambda view: {"classes": view.classes or None},
                applies=is_pose_model,
                needs="a pose model",
                reported=lambda count: 2 * count,
                report_options={"count": 8},
            ),
            Analysis(
                "routing",
                routing_statistics,
                "Routing",
                arguments=_for_routing,
                applies=lambda model: bool(mixtures(model)),
                stand_in=False,
                reported=lambda count: 4 * count,
            ),
            Analysis(
                "blocks",
                block_contributions,
                "Contributions of blocks",
                images=View.labeled_batches,
                applies=gives_scores,
                stand_in=False,
                reported=lambda count: 2 * count,
            ),
            Analysis(
                "masks",
                masks,
                "Learned masks",
                reads_images=_masked_by_image,
                applies=_masked,
                reported=lambda count: count,
            ),
            Analysis(
                "cam",
                class_activation,
                "Class activation",
                images=lambda view: view.images,
                arguments=_for_maps,
                applies=gives_scores,
                stand_in=False,
                reported=lambda count: min(count, 6),
            ),
            Analysis(
                "kernels",
                kernel_energy,
                "Kernel energy",
                reads_images=lambda model: False,
                reported=lambda count: 0,
            ),
            Analysis(
                "stability",
                translation_stability,
                "Translation stability",
                applies=lambda model: gives_scores(model) and not is_detector(model) and not is_pose_model(model),
                reported=lambda count: count,
                margin=lambda options, side: max(options.get("shifts") or usual_shifts(side)),
            ),
            Analysis(
                "interactions",
                interactions,
                "Multi-order interactions",
                images=lambda view: view.images,
                arguments=_for_interactions,
            ),
            Analysis(
                "shape-bias",
                shape_bias,
                "Shape bias",
                images=lambda view: view.pictures,
            ),
        )
    }
)
"""Name of an analysis -> how to run it."""
