"""``widefield eval``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from widefield.cli._subjects import MODEL_HELP

if TYPE_CHECKING:
    from widefield.data import SampleSet
    from widefield.loading import Subject
    from widefield.runs import Evaluation
    from widefield.tasks import Task

SUMMARY = "metrics and throughput of models: of runs, of timm's, of torchvision's"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--pretrained", action="store_true", help="download pretrained weights (default: random)")
    parser.add_argument(
        "--weights", choices=("ema", "model", "both"), help="weights of a run (the moving average if it has one)"
    )
    parser.add_argument("--which", choices=("best", "last"), help="checkpoint of a run (best)")
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help="a folder or URL of images in class folders, digits, scales, NAME:ROOT, or shards:ROOT/val-{000..049}.tar "
        "(the run's)",
    )
    parser.add_argument(
        "--size",
        nargs="+",
        default=[None],
        **number,
        help="sides of the images; of segmentation models and detectors: shorter sides; not for pose models (the "
        "model's own)",
    )
    parser.add_argument(
        "--task",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="options of the run's task to change, such as test=slide window=512, or flip=true scales=[0.75,1,1.25]",
    )
    parser.add_argument(
        "--boxes",
        type=Path,
        metavar="FILE",
        help="pose models: boxes of a detector in COCO's form of results, in place of true ones",
    )
    parser.add_argument(
        "--crop-pct", type=float, metavar="X", help="side of the crop relative to the resized image (the model's)"
    )
    parser.add_argument(
        "--class-map",
        default="auto",
        metavar="MAP",
        help="integer: folders are indices of outputs; sorted: folders are in the order of the outputs; or a file: the "
        "class of each output, one per line (default: by name, or by any unambiguous order)",
    )
    parser.add_argument(
        "--all-outputs",
        action="store_true",
        help="also let outputs compete that are no classes of the data (no)",
    )
    parser.add_argument(
        "--real", nargs="?", const=True, metavar="FILE", help="ImageNet-ReaL: real.json, or timm's copy without FILE"
    )
    parser.add_argument(
        "--skip-corrupt",
        action="store_true",
        help="leave out images that cannot be decoded (the run's; an error)",
    )
    parser.add_argument("--throughput", action="store_true", help="also time the model alone on random images")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), help="autocast (the run's; no)")
    parser.add_argument("--channels-last", action="store_true", help="memory order of images, weights (the run's; no)")
    parser.add_argument("--batch-size", **number, help="images per batch (the run's; 128; 4 if no classifier)")
    parser.add_argument("--workers", **number, help="loader processes (the run's; 4 at most)")
    parser.add_argument("--device", help="where to compute (a GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random weights (0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="write a page with the results of each class or key point, and the best and worst images",
    )
    parser.add_argument("--examples", **number, default=4, help="number of best and of worst images on the page (4)")
    parser.add_argument(
        "--min-score",
        type=float,
        default=0.3,
        metavar="X",
        help="detectors: least score of the objects drawn on the page; metrics take all (0.3)",
    )
    parser.set_defaults(writes={"page": False})
    parser.epilog = "Several processes share the images: accelerate launch -m widefield eval ..."


_LISTED = 20
"""Largest number of classes of a classifier whose results are printed."""


@dataclass(frozen=True)
class _Job:
    """A model and the data to evaluate it on."""

    subject: Subject
    dataset: SampleSet
    source: dict[str, Any]
    """Name and options of the data set."""
    task: Task
    outputs: int
    """Number of the model's outputs."""
    classes: int
    """Number of outputs that compete."""
    side: int | None
    """Side of the images that was asked for; None: the model's own."""
    how: dict[str, Any]
    """Further arguments of ``evaluate_model``."""


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from rich.console import Console

    from widefield._progress import ProgressLine
    from widefield.runs.accuracy import evaluate_model, processes

    state = processes()
    # Check all jobs and the output file first, to find errors before hours of work.
    jobs = _jobs(args)
    if args.out and state.is_main_process:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out.parent).close()
    if state.is_main_process:
        print(*dict.fromkeys(line for job in jobs for line in _found(job, args)), sep="\n")
    done = []
    with ProgressLine(Console(stderr=True), visible=state.is_main_process) as bar:
        for job in jobs:
            found = evaluate_model(
                job.subject.model,
                job.dataset,
                job.task,
                device=args.device,
                throughput=args.throughput,
                examples=args.examples if args.page else 0,
                progress=partial(bar.track, description=f"{job.subject.name} {job.dataset.image_size or ''}".rstrip()),
                **job.how,
            )
            job.subject.model.cpu()  # the next one needs the memory
            done.append((job, found))
    if state.is_main_process:
        _show(done, args)
        _write(done, args)
        if args.page:
            _write_page(done, args)
    if state.num_processes > 1:
        state.destroy_process_group()
    return 0


def _found(job: _Job, args: argparse.Namespace) -> Iterator[str]:
    """Yield a line about the data, and how they differ from what a run was evaluated on."""
    yield job.dataset.found()
    own = job.subject.trained_on if args.data is None and args.boxes is None else None
    note = own.note(job.dataset) if own else ""
    if note:
        yield f"the data of {job.subject.name} have {note}"


def _jobs(args: argparse.Namespace) -> list[_Job]:
    from widefield.loading import labels

    if (args.weights or args.which) and not any(map(_is_run, args.models)):
        raise ValueError("--weights and --which select a checkpoint of a run, and none of the models is a run.")
    real = labels.real_labels(None if args.real is True else args.real) if args.real else None
    subjects = [subject for word in args.models for subject in _subjects(word, args)]
    _check_options(subjects, args)
    return [_job(subject, size, real, args) for subject in subjects for size in args.size]


def _is_run(word: str) -> bool:
    from widefield.loading.model_file import is_model_folder

    return Path(word).expanduser().is_dir() and not is_model_folder(Path(word).expanduser())


def _subjects(word: str, args: argparse.Namespace) -> list[Subject]:
    """Return the model that a word names, one for each kind of weights that is asked for."""
    from widefield.loading import load
    from widefield.loading.trained import weights_in

    if not _is_run(word):
        return [load(word, pretrained=args.pretrained, seed=args.seed)]
    which = args.which or "best"
    kinds = weights_in(word, which) if args.weights == "both" else [args.weights]
    return [replace(load(word, which=which, weights=kind), name=word) for kind in kinds]


def _check_options(subjects: Sequence[Subject], args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not concern one of the models."""
    given = {"--crop-pct": args.crop_pct, "--real": args.real, "--all-outputs": args.all_outputs}
    given["--class-map"] = args.class_map if args.class_map != "auto" else None
    for subject in subjects:
        for option, value in given.items():
            if value and subject.work != "classification":
                raise ValueError(f"{option} is for classifiers, and {subject.name} is a model for {subject.work}.")
        if args.boxes and subject.work != "pose":
            raise ValueError(f"--boxes is for pose models, and {subject.name} is a model for {subject.work}.")
        if args.boxes and not args.boxes.expanduser().is_file():
            raise FileNotFoundError(f"--boxes: there is no file {str(args.boxes)!r}. Give the results of a detector.")
        if args.task and subject.recipe is None and subject.work == "classification":
            raise ValueError(f"--task changes options of a run's task, and {subject.name} is not a run.")


def _job(
    subject: Subject, size: int | None, real: Mapping[str, Sequence[int]] | None, args: argparse.Namespace
) -> _Job:
    from widefield.loading.inputs import CLASSIFIERS

    source = _source(subject, size, args)
    dataset = _dataset(subject, source, args)
    try:
        task, outputs, classes = _task(subject, dataset, real, args)
    except ValueError as error:
        raise ValueError(f"{subject.name} on {_called(source)}: {error}") from error
    recipe, usual = subject.recipe, 128 if subject.work in CLASSIFIERS else 4
    how = {
        "batch_size": (recipe.batch_size if recipe else usual) if args.batch_size is None else args.batch_size,
        "workers": (recipe.workers if recipe else _readers()) if args.workers is None else args.workers,
        "mixed_precision": args.precision or (recipe.mixed_precision if recipe else "no"),
        "channels_last": args.channels_last or (recipe is not None and recipe.channels_last),
    }
    return _Job(subject, dataset, source, task, outputs, classes, size, how)


def _task(
    subject: Subject,
    dataset: SampleSet,
    real: Mapping[str, Sequence[int]] | None,
    args: argparse.Namespace,
) -> tuple[Task, int, int]:
    """Return what to measure, the number of the model's outputs, and the number of those that compete."""
    from widefield import data
    from widefield.loading import labels
    from widefield.tasks import count_outputs
    from widefield.train.recipe_io import read_yaml

    own = args.data is None
    if subject.work != "classification":
        changes = {key: value for word in args.task for key, value in read_yaml(word.replace("=", ": ", 1)).items()}
        task = subject.task(dataset, **changes)
        # A set for segmentation may have objects, too; its classes then have a background.
        own = subject.work in ("detection", "pose", "masked_image")
        return task, subject.outputs, subject.outputs if own else len(dataset.classes)
    if not isinstance(dataset, data.LabeledImages):
        raise ValueError("the data have no labeled images, and the model is a classifier.")
    if not args.all_outputs:
        data.check_classes(dataset)
    outputs = count_outputs(subject.model, dataset.image_shape)
    names = subject.trained_on.classes if subject.trained_on else labels.imagenet_names(outputs)
    if subject.trained_on and own and args.class_map == "auto":
        subject.trained_on.check_classes(dataset.classes)
    places = labels.output_places(dataset.classes, outputs, names, args.class_map)
    competing = (names or [*map(str, range(outputs))]) if args.all_outputs else dataset.classes
    mapped = labels.MappedClassification(
        places, outputs, restrict=not args.all_outputs, real=real, class_names=competing
    )
    return mapped, outputs, len(mapped.places)


def _dataset(subject: Subject, source: Mapping[str, Any], args: argparse.Namespace) -> SampleSet:
    from widefield import data

    options = {key: value for key, value in source.items() if key != "name"}
    try:
        return data.create(source["name"], "val", **options)
    except FileNotFoundError as error:
        if subject.recipe is None or args.data is not None:
            raise
        raise FileNotFoundError(
            f"the data of the run {subject.name} are missing: {error} --data SOURCE evaluates it on others."
        ) from error


def _readers() -> int:
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(4, len(allowed))


def _source(subject: Subject, size: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """Return the name and the options of the data set to evaluate a model on."""
    from widefield.data import DetectionSet, MultiLabelImages, PoseSet, SegmentationSet
    from widefield.data._stores import is_url
    from widefield.data.catalog import SETS, options_of
    from widefield.data.image_files import ImageFiles
    from widefield.data.shards import Shards, divided

    own = {"name": subject.recipe.data.name, **subject.recipe.data.args} if subject.recipe else None
    if args.data is None:
        if own is None:
            raise ValueError(f"{subject.name} is not a run, so it has no data of its own: give --data.")
        name, root = own["name"], ""
    else:
        name, colon, root = args.data.partition(":")
        if not (colon and name in SETS):
            usual = {
                "segmentation": "masks",
                "multilabel": own["name"] if own else "label_table",
                "detection": own["name"] if own else "coco",
                "pose": own["name"] if own else "coco_keypoints",
            }.get(subject.work, "folder")
            is_root = is_url(args.data) or Path(args.data).expanduser().is_dir()
            name, root = (usual, args.data) if is_root else (args.data, "")
        if name not in SETS:
            raise ValueError(
                f"--data {args.data}: there is no such folder; or write NAME:ROOT or NAME, of {', '.join(SETS)}."
            )
    kind = SETS[name]
    if issubclass(kind, Shards) and root:
        root, files = divided(root)
        given = {"root": root or ".", **({"val": files} if files else {})}
    else:
        given = {"root": root} if root else {}
    dense = SegmentationSet, DetectionSet, PoseSet, MultiLabelImages  # whose options say what the labels are
    asked = subject.asked_options(kind, size)
    if args.crop_pct is not None:
        asked["crop_pct"] = args.crop_pct
    if args.real:
        if not issubclass(kind, ImageFiles):
            raise ValueError(f"--real finds labels by file names, and {name} has none.")
        asked["names"] = True
    if args.boxes is not None:
        if "boxes" not in options_of(kind):
            raise ValueError(
                f"--boxes is for data in COCO's form such as coco_keypoints, and {name} has true boxes only."
            )
        asked["boxes"] = str(args.boxes.expanduser().resolve())
    if args.skip_corrupt and "corrupt" in options_of(kind):
        asked["corrupt"] = "skip"
    if own and name == own["name"] and (not root or issubclass(kind, dense)):
        return {**own, **asked, **given}
    return {"name": name, **subject.file_options(kind, size), **asked, **given}


def _called(source: Mapping[str, Any]) -> str:
    return str(source.get("root", source["name"]))


def _show(done: Sequence[tuple[_Job, Evaluation]], args: argparse.Namespace) -> None:
    from widefield.tasks import ClassificationScores, DetectionScores, MultiLabelScores, PoseScores
    from widefield.tasks.metric_names import shown

    metrics = dict.fromkeys(name for _, found in done for name in found.metrics)
    samples = "crops" if all(isinstance(found.scores, PoseScores) for _, found in done) else "images"
    rows = []
    for job, found in done:
        row = {"model": job.subject.name, "weights": str(job.subject.weights), "data": _called(job.source)}
        row |= {"size": _size(job, found), samples: str(found.images)}
        counted = str(job.classes) if job.classes == job.outputs else f"{job.classes} of {job.outputs}"
        row["classes"] = counted if job.outputs else "-"
        row |= {name: shown(name, found.metrics.get(name)) for name in metrics}
        if found.images_per_second is not None:
            row["images/s"] = f"{found.images_per_second:.4g}"
        rows.append(row)
    args.printer.table(rows, right=[name for name in rows[0] if name not in ("model", "weights", "data")])
    for job, found in done:
        if isinstance(found.scores, (ClassificationScores, MultiLabelScores)) and len(found.scores.classes) > _LISTED:
            lines = found.scores.weakest(_LISTED)
            measured = "accuracy" if isinstance(found.scores, ClassificationScores) else "AP"
            print(f"{job.subject.name}: {found.scores.summary()}")
            print(f"the {_LISTED} classes with the lowest {measured}; --out has all {len(found.scores.classes)}:")
            args.printer.table(lines, right=[name for name in lines[0] if name not in ("class", "mistaken for")])
        elif found.scores is not None and (lines := found.scores.rows()):
            print(f"{job.subject.name}: {found.scores.summary()}")
            args.printer.table(
                lines, right=[name for name in lines[0] if name not in ("class", "key point", "mistaken for")]
            )
        if isinstance(found.scores, DetectionScores):
            args.printer.table(found.scores.size_rows())
            for kind, of_kind in found.scores.kinds.items():
                print(f"errors, {kind}: {of_kind.errors.summary()}")
        if isinstance(found.scores, PoseScores):
            sizes = found.scores.size_rows()
            args.printer.table(sizes, right=[name for name in sizes[0] if name != "size"])
            args.printer.table(found.scores.error_rows(), right=["compared"])


def _size(job: _Job, found: Evaluation) -> str:
    """Return the size of the images as text: of images that differ, the shorter side if it was asked for."""
    if isinstance(found.size, tuple):
        return "x".join(map(str, found.size))
    if found.size is not None:
        return str(found.size)
    return "varied" if job.side is None else f"{job.side} (shorter)"


def _write(done: Sequence[tuple[_Job, Evaluation]], args: argparse.Namespace) -> None:
    from widefield import bench

    results = []
    for job, found in done:
        about: dict[str, Any] = {"model": job.subject.name, "weights": str(job.subject.weights), "data": job.source}
        about |= {"outputs": job.outputs, "classes": job.classes}
        results.append({**about, **found.to_dict()})
    content = {"environment": bench.environment(done[0][1].device), "results": results}
    args.printer.add(**content)
    if not args.out:
        return
    content = {"command": shlex.join(["widefield", *args.words]), **content}
    args.out.write_text(json.dumps(content, indent=2, allow_nan=False, default=str) + "\n", encoding="utf-8")
    print(f"wrote {args.out}")


def _write_page(done: Sequence[tuple[_Job, Evaluation]], args: argparse.Namespace) -> None:
    from widefield.runs.evaluation_page import write_evaluation

    shown = {}
    for job, found in done:
        size = "" if len(args.size) == 1 else f", {_size(job, found)}"
        shown[f"{job.subject.name} ({job.subject.weights}{size})"] = (found, job.subject, _called(job.source))
    write_evaluation(shown, args.page, min_score=args.min_score)
    print(f"wrote {args.page}")
