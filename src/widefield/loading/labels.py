"""Evaluate on data whose classes do not match the model's outputs one to one: ImageNet-V2, -A, -R and -ReaL.

A data set has named classes, and a model has numbered outputs. This module finds the output of each class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo, RealLabelsImagenet, infer_imagenet_subset
from torch import Tensor, nn

from widefield import _checks
from widefield.data import Sample
from widefield.data.class_map import INTEGER, alike, indices_of, listed
from widefield.loading.words import parsed
from widefield.tasks import Batch, Classification, ClassPrediction, Prediction, count_outputs
from widefield.train.networks import TORCHVISION

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

CLASS_MAPS = ("auto", "sorted", INTEGER)
"""Values of a class map that are not files."""
_REAL_LABELS = 50_000
"""Number of images in ImageNet's validation split; timm's copy of the labels has all of them."""


def imagenet_names(outputs: int) -> tuple[str, ...] | None:
    """Return the WordNet identifiers of the outputs if timm knows a subset of ImageNet of this size, else None."""
    subset = infer_imagenet_subset({"num_classes": outputs})
    return tuple(ImageNetInfo(subset).label_names()) if subset else None


def output_places(
    classes: Sequence[str], outputs: int, names: Sequence[str] | None = None, class_map: str | Path = "auto"
) -> tuple[int, ...]:
    """Return the index of each class of a data set among a model's outputs.

    Args:
        classes: of the data set, such as the names of its folders.
        outputs: number of outputs of the model.
        names: names of the model's outputs, if they are known: the classes that it was trained on, see also
            :func:`imagenet_names`.
        class_map: ``"integer"``: the classes are the indices themselves, as in ImageNet-V2 (its folders are called 0 to
            999, and 10 does not come before 2). ``"sorted"``: the classes are in the order of the outputs. A text file:
            the class of each output, one per line, or ``name index`` on all lines. ``"auto"``: by ``names`` if they
            contain all classes, as in ImageNet-A and -R, whose folders are named like 200 of ImageNet's 1000; else by
            number if the classes are as many numbers as there are outputs; else in order if the names are unknown.

    Raises:
        ValueError: the classes do not fit the outputs, or are ambiguous; the message says what to give.
        OSError: the file cannot be read.
    """
    if class_map == "sorted":
        return _in_order(classes, outputs)
    if class_map != "auto":
        return _mapped(classes, outputs, class_map)
    place = {name: index for index, name in enumerate(names or ())}
    unknown = [name for name in classes if name not in place]
    if not unknown:
        return tuple(place[name] for name in classes)
    if len(classes) == outputs and all(map(_is_number, classes)):
        if names is None and list(map(int, classes)) != list(range(outputs)):
            raise ValueError(
                f"the data's classes are numbers, from {classes[0]!r} to {classes[-1]!r}, and the model's outputs have "
                f"no names: say whether they are in the order of the numbers (class map 'integer') or of the sorted "
                f"names ('sorted')."
            )
        return _mapped(classes, outputs, INTEGER)
    if names is None:
        return _in_order(classes, outputs)
    raise ValueError(
        f"{len(unknown)} of the data's {len(classes)} classes ({_some(unknown)}) are not among the model's "
        f"{len(names)} ({_some(names)}). A class map, a file with the class of each output, one a line, can say what "
        f"they are.{alike({*classes, *names})}"
    )


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _mapped(classes: Sequence[str], outputs: int, class_map: str | Path) -> tuple[int, ...]:
    try:
        place = indices_of(classes, class_map)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the class map must be {', '.join(map(repr, CLASS_MAPS))} or a text file; there is no file "
            f"{str(class_map)!r}.{_checks.did_you_mean(class_map, CLASS_MAPS)}"
        ) from error
    beyond = [name for name in classes if place[name] >= outputs]
    if beyond:
        raise ValueError(
            f"the class map {str(class_map)!r} puts {_some(beyond)} beyond the last of the model's {outputs} outputs."
        )
    return tuple(place[name] for name in classes)


def _in_order(classes: Sequence[str], outputs: int) -> tuple[int, ...]:
    if len(classes) != outputs:
        raise ValueError(
            f"the model has {outputs} outputs and the data {len(classes)} classes ({_some(classes)}). A class map, a "
            f"file with the class of each output, one a line, can say which are which."
        )
    return tuple(range(outputs))


def _some(names: Sequence[str]) -> str:
    return listed(names[:3]) + (", ..." if len(names) > 3 else "")


def real_labels(path: str | Path | None = None) -> dict[str, list[int]]:
    """Return the reassessed labels of ImageNet's validation images (Beyer et al. 2020, "Are we done with ImageNet?").

    Args:
        path: the authors' ``real.json``: a list for each image, in the order of the file names; None: timm's copy.

    Returns:
        File name -> indices of all correct labels; an empty list means that none is known.

    Raises:
        OSError, ValueError: the file cannot be read, or holds something else.
    """
    count = _REAL_LABELS
    if path is not None:
        path = Path(path).expanduser()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not all(isinstance(place, int) for labels in content for place in labels):
                raise TypeError
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} must hold a list of lists of class numbers, one for each image.") from error
        count = len(content)
    labels: dict[str, list[int]] = RealLabelsImagenet(range(count), path).real_labels
    return labels


class MappedClassification(Classification):
    """Classification by a model whose outputs are not the data's classes one by one.

    Batches are those of `Classification`; with ``real`` they also hold the images' file names as ``name``. The metrics
    are those of `Classification` among the data's classes. ``real`` adds ``real_top1`` and ``real_top5``: the fraction
    of images with reassessed labels for which one of these is the first prediction, or among the first five.

    Args:
        places: indices of the data's classes among the model's outputs; see :func:`output_places`.
        outputs: number of outputs of the model.
        restrict: drop the outputs that are not classes of the data, as intended for ImageNet-A and -R. Otherwise they
            compete, too.
        real: the labels of each file; see :func:`real_labels`.
        class_names: names of the competing outputs; default: their indices among themselves.

    Raises ValueError for fewer than two classes to choose from, and for reassessed labels of other outputs.
    """

    def __init__(
        self,
        places: Sequence[int],
        outputs: int,
        *,
        restrict: bool = True,
        real: Mapping[str, Sequence[int]] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.places = tuple(places) if restrict else tuple(range(outputs))
        super().__init__(len(self.places), class_names=class_names)
        largest = max((place for labels in (real or {}).values() for place in labels), default=-1)
        if largest >= outputs:
            raise ValueError(f"the reassessed labels go up to {largest}, and the model has {outputs} outputs.")
        self._outputs, self._real = outputs, real
        # Where the model's outputs stay in place, a label becomes its class's place.
        self._labels = None if restrict else torch.tensor(tuple(places))

    def check(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless the model has as many outputs as were announced."""
        found = count_outputs(model, shape)
        if found != self._outputs:
            raise ValueError(f"{type(model).__name__} has {found} outputs; {self._outputs} were announced.")

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """Return what `Classification` does for the competing outputs; with ``real`` also ``allowed`` (N, classes)."""
        label = batch["label"]
        if self._labels is not None:
            label = self._labels.to(label.device)[label]
        found = super().outputs(_Chosen(model, self.places), {**batch, "label": label})
        if self._real is not None:
            found["allowed"] = self._allowed(batch, self._real)[:, list(self.places)].to(label.device)
        return found

    def predict(self, model: nn.Module, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Return the probabilities of all outputs of the model; those that do not compete have none."""
        found = []
        for chosen in super().predict(_Chosen(model, self.places), images, sizes):
            whole = torch.zeros(self._outputs)
            whole[list(self.places)] = chosen.probabilities  # type: ignore[union-attr]
            found.append(ClassPrediction(whole))
        return [*found]

    def truth(self, sample: Sample) -> ClassPrediction:
        """Return the sample's label among the outputs of the model, with a probability of 1."""
        place = self.places[sample["label"]] if self._labels is None else int(self._labels[sample["label"]])
        return ClassPrediction(F.one_hot(torch.tensor(place), self._outputs).float())

    def _allowed(self, batch: Batch, real: Mapping[str, Sequence[int]]) -> Tensor:
        if "name" not in batch:
            raise ValueError("reassessed labels are found by file names, and this data set does not give them.")
        allowed = torch.zeros(len(batch["name"]), self._outputs, dtype=torch.bool)
        for row, name in enumerate(batch["name"]):
            file = PurePath(name).name
            if file not in real:
                raise ValueError(
                    f"there are no reassessed labels of {file!r}; they are of ImageNet's validation images, such as "
                    f"{next(iter(real), '')!r}."
                )
            allowed[row, list(real[file])] = True
        return allowed

    def metrics(self) -> MetricCollection:
        """Return those of `Classification`; with ``real`` also ``real_top1`` and, if more than five, ``real_top5``."""
        metrics: MetricCollection = super().metrics()
        if self._real is not None:
            from widefield.tasks.class_scores import AnyOf

            top = [k for k in (1, 5) if k == 1 or self.num_classes > k]
            metrics.add_metrics({f"real_top{k}": AnyOf(k, sync_on_compute=False) for k in top})
        return metrics


class _Chosen(nn.Module):
    """A selection of a model's outputs."""

    def __init__(self, model: nn.Module, places: Sequence[int]) -> None:
        super().__init__()
        self.model, self.places = model, list(places)

    def forward(self, image: Tensor) -> Tensor:
        chosen: Tensor = self.model(image)[:, self.places]
        return chosen


def published_classes(word: str, model: nn.Module) -> tuple[str, ...]:
    """Return the names of the outputs of a model's published weights, one or several words each; () if unknown."""
    name = parsed(word)[0]
    if name.startswith(TORCHVISION):
        from torchvision.models import get_model_weights

        return tuple(get_model_weights(name.removeprefix(TORCHVISION)).DEFAULT.meta.get("categories", ()))
    outputs = getattr(model, "num_classes", None)
    published = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    subset = infer_imagenet_subset({"num_classes": outputs}) if outputs == published else None
    return tuple(map(str, ImageNetInfo(subset).label_descriptions())) if subset else ()
