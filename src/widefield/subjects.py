"""Models by name, and what each expects of images: timm's, torchvision's, and those of runs.

What the commands, the report of a run and evaluation all begin with.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from widefield import _checks, data
from widefield.analysis.registry import View
from widefield.train import ModelSpec, RunData, create_model, load_recipe, load_trained, run_data
from widefield.train.labels import output_places
from widefield.train.networks import TORCHVISION
from widefield.train.recipe_io import read_yaml


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, and what it expects of images."""

    name: str
    """What to call it: the words it was asked for by, or the run's name."""
    model: nn.Module
    size: int
    """Side of the images, in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: str
    """Where they come from: "random", "pretrained", "file PATH" or "trained in this run"."""
    source: str = data.PHOTOGRAPHS
    """Images to show it unless others are asked for, as `widefield.data.Pictures` takes it: a run's own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the data set ``source``."""
    trained_on: RunData | None = None
    """Of a run: class names, number of images and so on."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the model's outputs where they are known; otherwise none.

        Those of a run are its own. Weights from elsewhere have the names of the data that the model's published weights
        were trained on, unless the head is another.
        """
        if self.trained_on:
            return self.trained_on.classes or ()
        return () if self.weights == "random" else _published_classes(self.name, self.model)

    def pictures(
        self, source: str | None = None, *, count: int | None = 32, size: int | None = None, seed: int = 0
    ) -> data.Pictures:
        """Return images as the model expects them: its own, or those of ``source``; arguments as of `Pictures`.

        Labels of a run's own images are indices of the model's outputs, whatever order the data's classes now have.

        Raises:
            MissingDataError: the data of a run are not at hand.
            ValueError: they have classes now that the run does not know.
        """
        given: dict[str, Any] = {
            "count": count, "size": size or self.size, "mean": self.mean, "std": self.std, "seed": seed,
        }  # fmt: skip
        if source is not None or self.trained_on is None:
            return data.Pictures(self.source if source is None else source, **given)
        try:
            return _OwnPictures(self.trained_on, self.source, options=self.options, **given)
        except (FileNotFoundError, NotADirectoryError, ImportError) as error:
            raise MissingDataError(
                f"the data of the run {self.name!r} are not at hand: {error} Ask for other images: a folder, or "
                f"{data.PHOTOGRAPHS!r} (--images)."
            ) from error

    def view(self, pictures: data.Pictures | data.ConflictImages | None = None, *, batch_size: int = 8) -> View:
        """Return the model and these images as analyses take them."""
        # ImageNet's names are lists of synonyms.
        classes = self.classes if self.trained_on else tuple(name.split(",")[0] for name in self.classes)
        own = isinstance(pictures, _OwnPictures) and bool(pictures.classes)
        return View(self.model, self.name, self.weights, pictures, classes, own, batch_size)

    def any_pictures(
        self, source: str | None = None, *, say: Callable[[str], None] = lambda text: None, **given: Any
    ) -> data.Pictures:
        """Return what :meth:`pictures` does, or photographs where the data of a run are not at hand.

        For whatever needs images, and not the run's. ``say`` is told where photographs stand in; arguments as of
        :meth:`pictures`.
        """
        try:
            return self.pictures(source, **given)
        except MissingDataError as error:
            say(f"{error.__cause__!s} Photographs stand in for the data of the run {self.name!r}.")
            return self.pictures(data.PHOTOGRAPHS, **given)


class MissingDataError(FileNotFoundError):
    """The data that a run was trained on are not at hand."""


class _OwnPictures(data.Pictures):
    """Images of a run's data set, whose labels are indices of the model's outputs."""

    def __init__(self, trained_on: RunData, source: str, **given: Any) -> None:
        super().__init__(source, **given)
        if trained_on.classes is not None:
            trained_on.check_classes(self.classes)
            self._places = output_places(self.classes, len(trained_on.classes), trained_on.classes)
            self.classes = trained_on.classes
        self._note = "" if self._from is None else trained_on.note(self._from)

    def found(self) -> str:
        """Return what `Pictures` does, and what has changed since the run."""
        return f"{super().found()}; {self._note}" if self._note else super().found()

    def sample(self, index: int) -> data.Sample:
        """Return image ``index``."""
        found = super().sample(index)
        return {**found, "label": self._places[found["label"]]}


def load(
    word: str,
    *,
    pretrained: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    beside: Sequence[str] = (),
) -> Subject:
    """Build or load the model that a word names.

    Args:
        word: a name of timm (``resnet50``) or of torchvision (``torchvision:resnet50``), each with arguments in braces
            if wanted (``replknet_31b{kernel_sizes: [3, 3, 3, 3]}``, YAML), or the folder of a run.
        pretrained: fetch the weights that timm or torchvision publish.
        seed: of random weights. The global generator is seeded.
        device: where the model goes.
        beside: words of models that stand beside it: a run whose name another one has is called by its folder.

    Raises:
        ValueError: unknown model or device, or arguments that the model refuses.
        TypeError: an argument that the model does not have.
        FileNotFoundError: a path without a folder, a folder without a run, or a run without checkpoints.
    """
    torch.manual_seed(seed)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {str(device)!r} is not at hand: {str(error).splitlines()[0]}") from error
    if Path(word).expanduser().is_dir():
        found = _of_run(Path(word).expanduser())
        if sum(Path(other).name == Path(word).name for other in set(beside)) > 1:
            found = replace(found, name=word)
    elif _is_path(word):
        raise FileNotFoundError(
            f"there is no folder {word!r}: give the folder of a run, or the name of a model, which has no slashes."
        )
    elif word.startswith(TORCHVISION):
        found = _of_torchvision(word, pretrained)
    else:
        found = _of_timm(word, pretrained)
    found.model.to(device).eval()
    return found


def _is_path(word: str) -> bool:
    """Return whether a word can be nothing but a path: models' names have no slashes, but behind timm's sources."""
    name = word.partition("{")[0]
    return ":" not in name and ("/" in name or os.sep in name or name.startswith(("~", ".")))


def _parsed(word: str) -> tuple[str, dict[str, Any]]:
    match = re.fullmatch(r"([^{}]+)(\{.*\})?", word, re.DOTALL)
    if match is None:
        raise ValueError(f"a model is a name, or a name and arguments in braces; got {word!r}.")
    try:
        given = read_yaml(match[2] or "{}")
    except ValueError as error:
        raise ValueError(f"the braces of {word!r} hold no YAML: {str(error).splitlines()[0]}.") from error
    return match[1].strip(), {str(key): value for key, value in given.items()}


def _of_timm(word: str, pretrained: bool) -> Subject:
    from timm.data import resolve_model_data_config

    name, given = _parsed(word)
    if name == word and ":" not in name and name.partition(".")[0] not in (known := timm.list_models()):
        raise ValueError(
            f"there is neither a folder {name!r}, nor does timm know a model of that name."
            f"{_checks.did_you_mean(name, known, likeness=0.7)}"
        )
    pretrained = bool(given.pop("pretrained", pretrained))
    model = create_model(ModelSpec(name, given, pretrained))
    config = resolve_model_data_config(model)
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if given.get("in_chans") == 1:  # grey images, of which timm's configuration knows nothing
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    weights = _weights_of_timm(model, given.get("checkpoint_path"), pretrained)
    return Subject(word, model, config["input_size"][-1], mean, std, weights)


def _weights_of_timm(model: nn.Module, checkpoint: object, pretrained: bool) -> str:
    """Return where timm got a model's weights from: a checkpoint, which it loads last, or as its configuration says."""
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    file = checkpoint or (config.get("file") if pretrained else None)
    return f"file {file}" if file else "pretrained" if pretrained else "random"


def _of_torchvision(word: str, pretrained: bool) -> Subject:
    from torchvision.models import get_model_weights

    name, given = _parsed(word)
    model = create_model(ModelSpec(name, given, pretrained))
    shown = get_model_weights(name.removeprefix(TORCHVISION)).DEFAULT.transforms()
    weights = "pretrained" if pretrained else "random"
    size = getattr(model, "image_size", shown.crop_size[0])  # a ViT takes no other
    return Subject(word, model, size, tuple(shown.mean), tuple(shown.std), weights)


def _published_classes(word: str, model: nn.Module) -> tuple[str, ...]:
    """Return the names of the outputs of a model's published weights, one or several words each; () if not known."""
    name = _parsed(word)[0]
    if name.startswith(TORCHVISION):
        from torchvision.models import get_model_weights

        return tuple(get_model_weights(name.removeprefix(TORCHVISION)).DEFAULT.meta.get("categories", ()))
    from timm.data import ImageNetInfo, infer_imagenet_subset

    outputs = getattr(model, "num_classes", None)
    published = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    subset = infer_imagenet_subset({"num_classes": outputs}) if outputs == published else None
    return tuple(map(str, ImageNetInfo(subset).label_descriptions())) if subset else ()


def _of_run(folder: Path) -> Subject:
    model = load_trained(folder)
    recipe, found = load_recipe(folder), run_data(folder)
    # Of the data set's options all but those that a Pictures decides itself.
    options = {key: value for key, value in recipe.data.args.items() if key not in ("size", "augment", "mean", "std")}
    shape = found.size, found.mean, found.std
    return Subject(recipe.name, model, *shape, "trained in this run", recipe.data.name, options, found)
