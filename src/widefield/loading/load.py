"""Build or load models with the images that each expects: those of timm and torchvision by name, of runs, of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import timm
import torch
from torch import nn

from widefield import _checks, _history
from widefield.loading.model_file import find_file, read_content, read_model
from widefield.loading.subject_json import attach, subject_from
from widefield.loading.subjects import ANY_LENGTH, Subject
from widefield.loading.torchvision_detectors import MEAN, STD, TEST_SCALE, build_detector, torchvision_detectors
from widefield.loading.trained import trained_subject
from widefield.loading.weights import Weights, weights_of_timm
from widefield.loading.words import is_path, parsed
from widefield.train import ModelSpec, create_model
from widefield.train.networks import TORCHVISION


def load(
    word: str,
    *,
    pretrained: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    together_with: Sequence[str] = (),
    which: str = "best",
    weights: str | None = None,
) -> Subject:
    """Build or load a model by name, from a run, or from a file.

    Args:
        word: a name of timm (``resnet50``) or of torchvision (``torchvision:resnet50``), with optional arguments in
            braces as YAML (``replknet_31b{kernel_sizes: [3, 3, 3, 3]}``); the folder of a run; or what
            :func:`widefield.save` wrote: a file, a folder, ``local-dir:FOLDER`` or ``hf-hub:USER/NAME``.
        pretrained: fetch the weights that timm or torchvision publish.
        seed: of random weights. The global generator is seeded.
        device: where the model goes.
        together_with: words of the models that are shown together. Runs with the same name are called by their folders.
        which, weights: which of a run's weights; see :func:`widefield.loading.load_trained`.

    Raises:
        ValueError: unknown model or device, or arguments that the model refuses.
        TypeError: an argument that the model does not have.
        FileNotFoundError: there is no such folder, no run in it, or no checkpoint.
    """
    torch.manual_seed(seed)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {str(device)!r} is not available: {str(error).splitlines()[0]}") from error
    file = find_file(word)
    if file is not None:
        found = _of_file(word, file)
    elif Path(word).expanduser().is_dir():
        found = trained_subject(Path(word).expanduser(), which, weights)
        if sum(Path(other).name == Path(word).name for other in set(together_with)) > 1:
            found = replace(found, name=word)
    elif is_path(word):
        raise FileNotFoundError(
            f"there is no folder {word!r}: give the folder of a run, a file or folder that widefield.save wrote, or "
            "the name of a model, which has no slashes."
        )
    elif word.startswith(TORCHVISION):
        found = _of_torchvision(word, pretrained)
    else:
        found = _of_timm(word, pretrained)
    if not _history.about(found.model):
        attach(found)
    found.model.to(device).eval()
    return found


def _of_file(word: str, path: Path) -> Subject:
    """Return the model of a file that `widefield.save` wrote; it goes by the name of the file, folder or repository."""
    content = read_content(path)
    model = read_model(path, content)
    place = Path(word.rpartition(":")[2].rstrip("/").partition("@")[0])
    called = place.stem if place.suffix == path.suffix else place.name
    subject = subject_from(content, model, name=called or path.resolve().parent.name)
    return attach(subject, **{key: content.get(key) for key in ("trained", "license", "notes")})


def _of_timm(word: str, pretrained: bool) -> Subject:
    name, given = parsed(word)
    if name == word and ":" not in name and name.partition(".")[0] not in (known := timm.list_models()):
        raise ValueError(
            f"there is neither a folder {name!r}, nor does timm know a model of that name."
            f"{_checks.did_you_mean(name, known, likeness=0.7)}"
        )
    pretrained = bool(given.pop("pretrained", pretrained))
    model = create_model(ModelSpec(name, given, pretrained))
    weights = weights_of_timm(model, given.get("checkpoint_path"), pretrained)
    return of_network(word, model, weights, gray=given.get("in_chans") == 1)


def of_network(name: str, model: nn.Module, weights: Weights, *, gray: bool = False) -> Subject:
    """Return a network of timm with the images that its configuration expects; ``gray``: images have one channel."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if gray:  # timm's configuration has no statistics for gray images
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return Subject(
        name,
        model,
        config["input_size"][-1],
        mean,
        std,
        weights,
        {key: config[key] for key in ("interpolation", "crop_pct", "crop_mode")},
        # The crop that the model's authors, or timm, found best for larger images than those of training.
        resolve_model_data_config(model, use_test_size=True)["crop_pct"],
    )


def _of_torchvision(word: str, pretrained: bool) -> Subject:
    from torchvision.models import get_model_weights

    name, given = parsed(word)
    if name.removeprefix(TORCHVISION) in _segmenters():
        return _segmenter_of_torchvision(word, pretrained)
    if name.removeprefix(TORCHVISION) in torchvision_detectors():
        return _detector_of_torchvision(word, pretrained)
    model = create_model(ModelSpec(name, given, pretrained))
    shown = get_model_weights(name.removeprefix(TORCHVISION)).DEFAULT.transforms()
    size = getattr(model, "image_size", shown.crop_size[0])  # a ViT accepts no other
    crop = {"interpolation": shown.interpolation.value, "crop_pct": shown.crop_size[0] / shown.resize_size[0]}
    weights = Weights("pretrained" if pretrained else "random")
    return Subject(word, model, size, tuple(shown.mean), tuple(shown.std), weights, crop)


def _segmenters() -> list[str]:
    """Return the names of torchvision's segmentation models."""
    from torchvision.models import list_models, segmentation

    return list(list_models(module=segmentation))


def _segmenter_of_torchvision(word: str, pretrained: bool) -> Subject:
    from torchvision.models import get_model, get_model_weights

    name, given = parsed(word)
    name = name.removeprefix(TORCHVISION)
    published = get_model_weights(name).DEFAULT
    chosen = {"weights": published} if pretrained else {"weights": None, "weights_backbone": None}
    try:
        model = get_model(name, **chosen, **given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"torchvision cannot build {name!r} with {given}: {error}.") from error
    _history.set_origin(model, "torchvision", name=name, args=given)
    shown = published.transforms()
    side = shown.resize_size[0]
    return Subject(
        word,
        model,
        side,
        tuple(shown.mean),
        tuple(shown.std),
        Weights("pretrained" if pretrained else "random"),
        {"test_scale": (ANY_LENGTH * side, side), "antialias": True},
        work="segmentation",
    )


def _detector_of_torchvision(word: str, pretrained: bool) -> Subject:
    name, given = parsed(word)
    model, names = build_detector(name.removeprefix(TORCHVISION), given, pretrained=pretrained)
    return Subject(
        word,
        model,
        TEST_SCALE[1],
        MEAN,
        STD,
        Weights("pretrained" if pretrained else "random"),
        {"test_scale": TEST_SCALE},
        work="detection",
        published_classes=names if pretrained else (),
    )
