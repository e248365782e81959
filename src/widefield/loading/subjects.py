"""Load models by name, with the preprocessing that each expects: timm's, torchvision's, and those of runs.

The commands, the report about runs and the evaluation load their models with this module.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor, nn

from widefield import _checks, data, tasks
from widefield.analysis.registry import View
from widefield.data import transforms
from widefield.data.image_files import EncodedImages
from widefield.loading import inputs
from widefield.loading.inputs import Classes, Cropped, Fitted, OwnCrops, OwnPictures, Pixels, Selection, count_maps
from widefield.loading.labels import published_classes
from widefield.loading.weights import Weights
from widefield.report import Report
from widefield.tasks import Task, count_outputs
from widefield.train import Recipe, RunData


@dataclass(frozen=True)
class Subject(Report):
    """A model in evaluation mode, and what it expects of images."""

    name: str
    """The word it was asked for by, or the run's name."""
    model: nn.Module
    size: int
    """Side of the images, in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: Weights
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    """Further options for image files, such as ``crop_pct`` and ``interpolation``."""
    test_crop_pct: float | None = None
    """The ``crop_pct`` for images of another size than ``size``, if it differs."""
    recipe: Recipe | None = None
    """Of a run."""
    trained_on: RunData | None = None
    """Of a run: class names, number of images and so on."""
    work: str = "classification"
    """What the model does: the name of a task."""
    published_classes: tuple[str, ...] = ()
    """Names of the classes of a detector with published weights, and of a file; empty for runs."""

    def summary(self) -> str:
        """Return name, task and weights."""
        return f"{self.name}: {type(self.model).__name__} for {self.work}, weights {self.weights}"

    def rows(self) -> list[dict[str, str]]:
        """Return one row: what the model expects of images, its size and its classes."""
        names = self.output_names
        return [
            {
                "image side, px": str(self.size),
                "mean": ", ".join(f"{value:.3g}" for value in self.mean),
                "std": ", ".join(f"{value:.3g}" for value in self.std),
                "parameters": f"{sum(parameter.numel() for parameter in self.model.parameters()):,}",
                "outputs": f"{len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "-",
            }
        ]

    def image_options(self, size: int | None = None) -> dict[str, Any]:
        """Return the options of a set of image files that prepares images as the model expects them.

        Args:
            size: side of the images; default: the model's own.
        """
        resized = self.test_crop_pct is not None and size not in (None, self.size)
        crop = {"crop_pct": self.test_crop_pct} if resized else {}
        return {"size": size or self.size, "mean": self.mean, "std": self.std, **self.preprocessing, **crop}

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the model's outputs; empty if they are unknown.

        A run knows its own. Other weights get the classes of the published weights, unless their head has another size.
        """
        if self.work == "masked_image":  # it gives features, whatever the classes of its images
            return ()
        if self.trained_on:
            return (self.work == "detection" and self.trained_on.object_classes) or self.trained_on.classes
        if self.work == "detection" or self.published_classes:
            return self.published_classes
        return () if self.weights.origin == "random" else published_classes(self.name, self.model)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return one name for each output, for figures; empty if they are unknown."""
        # ImageNet's names are lists of synonyms.
        return self.classes if self.trained_on else tuple(name.split(",")[0] for name in self.classes)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Return one name for each output: key points of a pose model, else the classes; empty if they are unknown."""
        skeleton = self.trained_on.skeleton if self.work == "pose" and self.trained_on else None
        return skeleton.names if skeleton else self.class_names

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """Return the color of each class in figures; empty for a classifier."""
        if self.work in inputs.SQUARE:
            return ()
        if self.work in ("detection", "pose"):
            return self._object_palette()
        own = self.trained_on.palette if self.trained_on else ()
        return own or tuple(itertools.islice(itertools.cycle(data.default_palette(256)), self.outputs))

    def _object_palette(self) -> tuple[tuple[int, int, int], ...]:
        """Return the data's colors of the classes of objects, or as many of our own."""
        run = self.trained_on
        if run and len(run.palette) == len(run.classes) and set(self.classes) <= set(run.classes):
            return tuple(run.palette[run.classes.index(name)] for name in self.classes)
        return data.object_palette(self.classes or [""] * self.outputs)

    @cached_property
    def outputs(self) -> int:
        """Return the number of classes that the model tells apart; 0 for masked pre-training."""
        if self.trained_on and (self.classes or self.work == "masked_image"):
            return len(self.classes)
        if self.work == "detection":
            return int(getattr(self.model, "num_classes"))  # noqa: B009 (of dense.Detector; mypy knows a Module)
        if self.work in inputs.CLASSIFIERS:
            return count_outputs(self.model, (len(self.mean), self.size, self.size))
        return count_maps(self.model, (len(self.mean), 64, 64))

    def task(self, dataset: data.SampleSet | None = None, **changes: Any) -> Task:
        """Return the task that the model was made for.

        Args:
            dataset: what it is evaluated on; its classes must be those of the model. Default: no data, for predictions.
            changes: options of the task to change.

        Raises:
            ValueError: the data are not of the task's kind, or have other classes. Or an option is out of range.
            TypeError: the task has no such option.
        """
        if dataset is not None:
            self._check_data(dataset)
        if self.recipe and self.trained_on:
            options = {**self.recipe.task.args, **changes}
            return tasks.create(self.recipe.task.name, dataset or self.trained_on, **options)
        names = self.class_names or tuple(f"class {k}" for k in range(self.outputs))
        masks = {"model": "mask_rcnn"} if self.work == "detection" and getattr(self.model, "has_masks", False) else {}
        return tasks.create(self.work, dataset or Classes(names), **{**masks, **changes})

    def _check_data(self, dataset: data.SampleSet) -> None:
        if self.work == "segmentation" and not isinstance(dataset, data.SegmentationSet):
            raise ValueError("the data have no masks, and the model is one for segmentation.")
        if self.work == "detection" and not getattr(dataset, "object_classes", ()):
            raise ValueError("the data have no objects with boxes, and the model is a detector.")
        if self.work == "pose" and not isinstance(dataset, data.PoseSet):
            raise ValueError("the data have no key points, and the model is one for poses.")
        if self.work == "multilabel" and not isinstance(dataset, data.MultiLabelImages):
            raise ValueError("the images of the data have one label at most, and the model is one for several.")
        if self.trained_on and self.work != "masked_image" and list(dataset.classes) != list(self.trained_on.classes):
            self.trained_on.check_classes(dataset.classes)
            raise ValueError("the data have fewer classes than the run, or in another order: give data with the same.")
        if self.trained_on is None and len(dataset.classes) != self.outputs:
            raise ValueError(f"the model tells {self.outputs} classes apart, and the data have {len(dataset.classes)}.")

    def own_data(self, *, true_boxes: bool = False) -> data.SampleSet:
        """Return the validation data of a run; raises MissingDataError if they are missing.

        Args:
            true_boxes: of a pose run, take crops of people with labels, also if the run is measured with the boxes of a
                detector, whose crops have no labels.
        """
        if self.recipe is None:
            raise MissingDataError(f"{self.name} is not a run, so it has no data of its own.")
        given = self.recipe.data.args
        options = inputs.with_true_boxes(given) if true_boxes and self.work == "pose" else given
        try:
            return data.create(self.recipe.data.name, "val", **options)
        except (FileNotFoundError, NotADirectoryError, ImportError) as error:
            raise MissingDataError(f"the data of the run {self.name!r} are missing: {error}") from error

    def asked_options(self, kind: type[data.SampleSet], size: int | None) -> dict[str, Any]:
        """Return the options of a data set of this kind that give the val images another size; {} for None.

        Raises ValueError for a pose model, whose crops have one size.
        """
        if size is None:
            return {}
        if self.work == "pose":
            raise ValueError(f"the crops of a pose model have one size, that of {self.name}. Leave out --size.")
        return {"test_scale": self._scale(size)} if "test_scale" in data.options_of(kind) else {"size": size}

    def file_options(self, kind: type[data.SampleSet], size: int | None = None) -> dict[str, Any]:
        """Return the options of a data set of this kind that prepare image files as the model expects them."""
        if issubclass(kind, EncodedImages):
            return self.image_options(size)
        if "test_scale" in data.options_of(kind):
            scale = self._scale(size)
            named = {"classes": list(self.classes)} if "classes" in kind.needs else {}
            return {**named, "mean": self.mean, "std": self.std, "test_scale": scale, "antialias": self._antialias}
        return self._pose_options() if issubclass(kind, data.PoseSet) else {}

    def _pose_options(self) -> dict[str, Any]:
        """Return how a pose model's crops are made, in JSON types; {} for other models and unknown ones."""
        if self.trained_on is None or self.work != "pose":
            return {}
        return {name: getattr(self.trained_on, name) for name in ("crop_size", "padding", "udp", "mean", "std")}

    @property
    def decoding(self) -> dict[str, Any]:
        """Return how image files are decoded: arguments of `widefield.data.decoding.read`."""
        return {key: self.preprocessing[key] for key in _DECODING if key in self.preprocessing}

    def preparation(self, size: int | None = None) -> dict[str, Any]:
        """Return facts about how :meth:`prepare` makes the model's input of an image, in JSON types."""
        given = self.image_options(size)
        if self.work == "pose":
            given = self._pose_options()
        elif self.work not in inputs.SQUARE:
            given = {"test_scale": self._scale(size), "mean": self.mean, "std": self.std, "antialias": self._antialias}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}

    def prepare(self, size: int | None = None) -> Callable[[Image.Image], Tensor]:
        """Return a function from an RGB image of any size to the model's input, float32 (C, H, W).

        For a pose model it is the image itself, uint8 (C, H, W), as its crops depend on the boxes.

        Args:
            size: side of a classifier's input; of other models the shorter side. Default: the model's own.

        Raises:
            ValueError: the model takes neither gray nor RGB images, or an option is out of range.
        """
        if size is not None:
            _checks.integer("size", size)
        if len(self.mean) not in (1, 3):
            raise ValueError(f"{self.name} takes images with {len(self.mean)} channels, and files hold 1 or 3.")
        if self.work == "pose":
            return Pixels(len(self.mean))
        if self.work not in inputs.SQUARE:
            return Fitted(self._scale(size), self.mean, self.std, antialias=self._antialias)
        options = {key: value for key, value in self.image_options(size).items() if key not in _HANDLING}
        return Cropped(transforms.evaluation(**options), len(self.mean))

    @property
    def _antialias(self) -> bool:
        return bool(self.preprocessing.get("antialias", False))

    def _scale(self, size: int | None) -> tuple[int, int] | None:
        """Return (longer side, shorter side) of the rectangle that images are fitted into; None keeps their size."""
        if size is not None:
            return ANY_LENGTH * size, size
        scale: tuple[int, int] | None = self.preprocessing.get("test_scale")
        return scale

    def pictures(
        self, source: str | None = None, *, count: int | None = 32, size: int | None = None, seed: int = 0
    ) -> data.Pictures:
        """Return images as the model expects them; arguments as of `Pictures`. Those of a pose run are like its crops.

        The default source is a run's validation data, or photographs for other models. Labels of a run's own images are
        indices of the model's outputs, in whatever order the data's classes are now.

        Raises:
            MissingDataError: the data of a run are missing.
            ValueError: they have classes that the run does not know.
        """
        given: dict[str, Any] = {
            "count": count, "size": size or self.size, "mean": self.mean, "std": self.std, "seed": seed,
        }  # fmt: skip
        posed = self.trained_on if self.work == "pose" else None
        crop = inputs.crop_sides(posed.crop_size, given["size"]) if posed else None
        if source is not None or self.recipe is None or self.trained_on is None:
            source = data.PHOTOGRAPHS if source is None else source
            return inputs.CutPictures(source, crop, **given) if crop else data.Pictures(source, **given)
        spec = self.recipe.data
        options = {key: value for key, value in spec.args.items() if key not in _DECIDED}
        try:
            if crop:
                return OwnCrops(spec.name, spec.args, crop, count, seed)
            return OwnPictures(self.trained_on, spec.name, options=options, **given)
        except (FileNotFoundError, NotADirectoryError, ImportError) as error:
            raise MissingDataError(
                f"the data of the run {self.name!r} are missing: {error} Ask for other images: a folder, or "
                f"{data.PHOTOGRAPHS!r} (--images)."
            ) from error

    def view(self, pictures: data.Pictures | data.ConflictImages | None = None, *, batch_size: int = 8) -> View:
        """Return the model and these images as analyses take them."""
        labels = "" if self.work == "masked_image" else str(getattr(pictures, "own_labels", ""))
        return View(self.model, self.name, str(self.weights), pictures, self.output_names, labels, batch_size)

    def object_view(self, count: int) -> View:
        """Return the model and samples of its own validation data, with objects or key points, as analyses take them.

        Args:
            count: number of samples; a seeded choice if there are more.

        Raises:
            MissingDataError: the model is not a run, or the data of the run are missing.
            ValueError: the data have neither.
        """
        whole = self.own_data(true_boxes=True)
        if not getattr(whole, "object_classes", ()) and not isinstance(whole, data.PoseSet):
            raise ValueError(f"the data of the run {self.name!r} have neither objects with boxes nor key points.")
        source, samples = self.recipe.data.name if self.recipe else "", Selection(whole, count)
        return View(self.model, self.name, str(self.weights), None, self.output_names, samples=samples, source=source)

    def any_pictures(
        self, source: str | None = None, *, say: Callable[[str], None] = lambda text: None, **given: Any
    ) -> data.Pictures:
        """Return what :meth:`pictures` does, or photographs if the data of a run are missing.

        ``say`` is called with a message about the fallback; other arguments as of :meth:`pictures`.
        """
        try:
            return self.pictures(source, **given)
        except MissingDataError as error:
            say(f"{error.__cause__!s} Photographs stand in for the data of the run {self.name!r}.")
            return self.pictures(data.PHOTOGRAPHS, **given)


class MissingDataError(FileNotFoundError):
    """The data that a run was trained on are missing."""


_DECIDED = ("size", "augment", "mean", "std")
"""Options of a run's data set that `Pictures` decides itself."""
_DECODING = ("exif_orientation", "max_pixels")
"""Options of a run's data set about decoding."""
_HANDLING = ("corrupt", "max_corrupt", *_DECODING)
"""Options of image files that do not concern a decoded image."""
ANY_LENGTH = 1000
"""Largest ratio of an image's sides if only the shorter one is given."""
