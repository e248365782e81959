"""Save, load and publish models: converted, reparameterized, trimmed and trained ones, of every task."""

from __future__ import annotations

import importlib.metadata
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from widefield import _checks, _history
from widefield._files import staged
from widefield.dense import Detector, HeatmapPose, Segmenter
from widefield.loading.load import load as load_subject
from widefield.loading.load import of_network
from widefield.loading.model_card import model_card
from widefield.loading.model_file import CARD, CONFIG, ENDING, FORMAT, KEY, WEIGHTS, refuse_wrapper, write
from widefield.loading.subject_json import subject_content, subject_from, without_places
from widefield.loading.subjects import ANY_LENGTH, Subject
from widefield.loading.weights import Weights
from widefield.train import RunData

_KINDS: Mapping[str, type[nn.Module]] = {"segmentation": Segmenter, "detection": Detector, "pose": HeatmapPose}
_DENSE_SIZE = 512
"""Shorter side of the images for a segmentation model or detector without a run, unless another one is given."""
_SIZE = 224


@_checks.guided
def save(
    model: nn.Module | Subject | str | Path,
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    args: Mapping[str, Any] | None = None,
    license: str | None = None,
    notes: str | None = None,
) -> Path:
    """Write a model to one file, or to a folder for the Hugging Face Hub, from which :func:`load` builds it again.

    The file holds the weights, and as JSON the network, its arguments, and all that was done to it since: conversions,
    merged layers, cropped kernels. It also holds the task, the names of the classes, how images are prepared, and for
    runs recipe and metrics. Nothing is pickled. The file is read back before it appears: a model that could not be
    loaded in another process is refused.

    Args:
        model: a module: a network of timm or a model of `widefield.dense`, changed by functions of widefield in any
            order; or a subject of `widefield.loading.load`; or words for it, such as the folder of a run.
        path: ends in ``.safetensors``: that file. Without an ending: a folder with ``model.safetensors``,
            ``config.json`` for timm, and a model card, ``README.md``.
        classes: names of the classes. Default: those of the run or of the published weights.
        size: side of the images in pixels; for other models than classifiers the shorter side.
        mean, std: of each channel, for pixels in [0, 1]. Default of ``size``, ``mean`` and ``std``: those of the run or
            of timm's configuration, else ImageNet's.
        args: arguments of ``timm.create_model`` in JSON types, if the network was built with others that cannot be
            saved, such as classes, or by timm before 1.0.31, which does not remember them.
        license: for the model card, such as "apache-2.0".
        notes: sentences for the model card: data, purpose, limits.

    Returns:
        The path.

    Raises:
        ValueError: the model cannot be built again, with the reason and the mend; or an argument does not fit.
        TypeError: an argument of another type.
        OSError: the path cannot be written; and as of `widefield.loading.load`.
    """
    target = Path(path).expanduser()
    if target.suffix not in ("", ENDING) and not target.is_dir():
        raise ValueError(f"path must end in {ENDING}, or be a folder; got {str(path)!r}.")
    subject = described(model, classes=classes, size=size, mean=mean, std=std)
    if args is not None:
        _give_args(subject.model, args)
    content = _content(subject, license, notes)
    if target.suffix == ENDING and not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, subject.model, content)
        return target
    with staged(target) as folder:
        _write_folder(folder, subject, content, target.name)
    return target


@_checks.guided
def load(source: str | Path, *, device: torch.device | str = "cpu") -> nn.Module:
    """Load a model that :func:`save` wrote, in evaluation mode.

    It needs no code but widefield, timm and torchvision, and computes what the saved model computes. It can be trained,
    changed, saved again, and given to all functions of widefield.

    Args:
        source: a ``.safetensors`` file, a folder, ``local-dir:FOLDER``, ``hf-hub:USER/NAME`` or
            ``hf-hub:USER/NAME@REVISION``. The folder of a run, and names of models with published weights, work too.
        device: where the model goes.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the file holds weights alone, is of a later version of widefield, or describes a network that this
            version cannot build.
        OSError: the download fails.
    """
    with torch.random.fork_rng():
        return load_subject(str(source), pretrained=True, device=device).model


@_checks.guided_with("classes", "size", "mean", "std", "args", "license", "notes")
def push_to_hub(
    model: nn.Module | Subject | str | Path,
    repository: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Add model",
    **options: Any,
) -> str:
    """Write a model to a repository of the Hugging Face Hub; ``widefield.load("hf-hub:USER/NAME")`` loads it.

    A model card that is there already stays.

    Args:
        model: as in :func:`save`.
        repository: USER/NAME; it is created if there is none.
        private: whether a new repository is private.
        token: of the Hub; default: that of ``hf auth login``.
        revision: branch to write to.
        message: of the commit.
        options: ``classes``, ``size``, ``mean``, ``std``, ``args``, ``license`` and ``notes`` of :func:`save`.

    Returns:
        The address of the commit.

    Raises:
        ValueError, TypeError: as of :func:`save`.
        OSError: the Hub cannot be reached, or refuses.
    """
    import huggingface_hub

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, repository.rpartition("/")[2])
        save(model, folder, **options)
        api = huggingface_hub.HfApi(token=token, library_name=KEY, library_version=_version())
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if api.file_exists(repo_id=name, filename=CARD, revision=revision):
            (folder / CARD).unlink()
        else:
            (folder / CARD).write_text(
                (folder / CARD).read_text(encoding="utf-8").replace("hf-hub:USER/NAME", f"hf-hub:{name}"),
                encoding="utf-8",
            )
        return str(api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=message))


def described(
    model: nn.Module | Subject | str | Path,
    *,
    classes: Sequence[str] | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Subject:
    """Return a model with the images that it expects; arguments and errors as of :func:`save`."""
    subject = subject_of(model)
    if size is not None:
        subject = replace(subject, size=_checks.integer("size", size), preprocessing=_with_size(subject, size))
    for name, values in (("mean", mean), ("std", std)):
        if values is not None:
            if len(values) != len(subject.mean):
                raise ValueError(f"{name} must have {len(subject.mean)} numbers, one a channel; got {list(values)}.")
            given: dict[str, Any] = {name: tuple(float(value) for value in values)}
            subject = replace(subject, **given)
    if classes is not None:
        if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
            raise TypeError(f"classes must be a list of names; got {classes!r}.")
        if len(classes) != subject.outputs:
            raise ValueError(f"classes has {len(classes)} names, and the model tells {subject.outputs} classes apart.")
        subject = replace(subject, trained_on=_with_classes(subject, tuple(classes)))
    if subject.weights.origin == "random":  # who saves a model has trained it, or does not care
        subject = replace(subject, weights=Weights("file"))
    return subject


def subject_of(model: nn.Module | Subject | str | Path) -> Subject:
    """Return a model with the images that it expects, as far as it is known; raises ValueError or TypeError."""
    if isinstance(model, Subject):
        return model
    if isinstance(model, (str, Path)):
        return load_subject(str(model), pretrained=True)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a module, the folder of a run, or a file of widefield; got {type(model).__name__}."
        )
    refuse_wrapper(model)
    known = _history.about(model).get("subject")
    if known is not None:
        return subject_from(_history.about(model), model, str(_history.about(model)["name"]))
    name = type(model).__name__
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, Mapping) and config.get("architecture"):
        return of_network(str(config["architecture"]), model, Weights("file"))
    work = next((work for work, kind in _KINDS.items() if isinstance(model, kind)), "classification")
    side = _SIZE if work == "classification" else _DENSE_SIZE
    square = {"interpolation": "bilinear", "crop_pct": 0.875}
    options = square if work == "classification" else {"test_scale": (ANY_LENGTH * side, side)}
    found = Subject(
        name, model, side, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Weights("file"), options, work=work
    )  # fmt: skip
    if work == "pose":
        raise ValueError(
            "a pose model needs the names of its key points and the size of its crops, which only its run knows: give "
            "the folder of the run, or the model of widefield.loading.load(FOLDER)."
        )
    return found


def _with_size(subject: Subject, size: int) -> dict[str, Any]:
    scale = {"test_scale": (ANY_LENGTH * size, size)} if "test_scale" in subject.preprocessing else {}
    return {**subject.preprocessing, **scale}


def _with_classes(subject: Subject, classes: tuple[str, ...]) -> RunData:
    objects = classes if subject.work == "detection" else ()
    if subject.trained_on is not None:
        return replace(subject.trained_on, classes=classes, object_classes=objects)
    return RunData(classes, subject.size, subject.mean, subject.std, {}, object_classes=objects)


def _give_args(model: nn.Module, args: Mapping[str, Any]) -> None:
    start = _history.origin(model)
    if start is None or start["kind"] != _history.TIMM:
        raise ValueError(f"args are of timm.create_model, and {type(model).__name__} is not a network of timm.")
    vars(model)["_model_args"] = dict(args)


def _content(subject: Subject, license: str | None, notes: str | None) -> dict[str, Any]:
    about = _history.about(subject.model)
    hidden = replace(subject, recipe=without_places(subject.recipe)) if subject.recipe else subject
    facts = subject_content(hidden)
    if facts["classes"] and len(facts["classes"]) != _outputs(subject):  # a head of its own
        facts["classes"] = []
    return {
        "format": FORMAT,
        "widefield": _version(),
        "name": subject.name,
        "subject": facts,
        "trained": _finite(about.get("trained")),
        "license": license or about.get("license") or _license_of(subject),
        "notes": notes or about.get("notes"),
    }


def _outputs(subject: Subject) -> int:
    """Return the number of outputs; 0 for a model that does not run, of which :func:`write` finds out what is wrong."""
    try:
        return subject.outputs
    except ValueError:
        return 0


def _finite(value: Any) -> Any:
    """Return a value with None in place of numbers that JSON has not, such as NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _license_of(subject: Subject) -> str | None:
    """Return the license of published weights, as timm states it."""
    found = (getattr(subject.model, "pretrained_cfg", None) or {}).get("license")
    return str(found) if found and subject.weights.origin == "pretrained" else None


def _write_folder(folder: Path, subject: Subject, content: Mapping[str, Any], name: str) -> None:
    write(folder / WEIGHTS, subject.model, content)
    history = _history.described(subject.model) or {}
    config = _timm_config(subject, history)
    config[KEY] = {"format": FORMAT, "widefield": content["widefield"]}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    parameters = sum(parameter.numel() for parameter in subject.model.parameters())
    text = model_card(content, history, name, subject, parameters)
    (folder / CARD).write_text(text, encoding="utf-8")


_PLACES = ("url", "file", "source", "hf_hub_id", "hf_hub_filename", "state_dict", "architecture", "tag", "label_offset")
"""Entries of timm's configuration about other weights than those that are saved."""


def _timm_config(subject: Subject, history: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config.json`` as timm reads it: with its own network, or with `widefield_shared`."""
    origin, steps = history["origin"], history["steps"]
    if origin["kind"] != _history.TIMM:
        return {"architecture": "widefield_shared", "library_name": KEY, "task": subject.work}
    given = getattr(subject.model, "pretrained_cfg", None) or {}
    kept = {k: v for k, v in given.items() if v is not None and k not in _PLACES and _history.is_plain(v)}
    crop = {k: v for k, v in subject.preprocessing.items() if k in ("interpolation", "crop_pct", "crop_mode")}
    classes = getattr(subject.model, "num_classes", subject.outputs)
    config = {
        **kept, **crop, "custom_load": False, "num_classes": classes,
        "input_size": [len(subject.mean), subject.size, subject.size], "mean": subject.mean, "std": subject.std,
    }  # fmt: skip
    named = {"label_names": list(subject.class_names)} if subject.class_names else {}
    changed = {"architecture": "widefield_shared", "model_args": {"history": history}}
    return {
        **(changed if steps else {"architecture": origin["name"], "model_args": origin["args"]}),
        "num_classes": classes,
        "num_features": getattr(subject.model, "num_features", None),
        **named,
        "pretrained_cfg": config,
    }


def _version() -> str:
    try:
        return importlib.metadata.version(KEY)
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "0"
